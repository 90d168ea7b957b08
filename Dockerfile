# syntax=docker/dockerfile:1
# The service around one bundle: no torch, no compiler, no root. It also runs `automl-cv predict` for large batches.
#   make image BUNDLE=outputs/runs/photos/model
FROM python:3.12-slim AS build
# Which extras: serve on a CPU, gpu for CUDA's onnxruntime instead, and any of otel, openvino, gcs, s3 with them.
ARG EXTRAS=serve
WORKDIR /src
COPY constraints.txt setup.py settings.ini pyproject.toml README.md ./
COPY automl_cv automl_cv
# What the service never reads stays out: pip, the packages' own tests, type stubs, headers, converters, and the second copy
# of onnxruntime, which is for programs in C.
RUN python -m venv --without-pip /opt/automl_cv \
 && pip --python /opt/automl_cv/bin/python install --no-cache-dir --no-compile -c constraints.txt ".[${EXTRAS}]" \
 && cd /opt/automl_cv/lib/python3*/site-packages \
 && rm -rf onnxruntime/transformers onnxruntime/quantization onnxruntime/tools onnxruntime/capi/libonnxruntime.so* numpy/f2py \
 && find . -type d \( -name tests -o -name include \) -prune -exec rm -rf {} + \
 && find . -type f \( -name '*.pyi' -o -name '*.a' \) -delete
ARG BUNDLE=outputs/runs/demo/model
COPY ${BUNDLE} /model
COPY deploy/sbom.py ./
# The weights stay out: they are for further training. One real request: a bundle that does not answer builds no image,
# and what the service imports is compiled here, once, because a container has nowhere to keep bytecode and would compile
# at each start.
ENV PATH=/opt/automl_cv/bin:$PATH PYTHONPYCACHEPREFIX=/opt/automl_cv/bytecode
RUN rm -f /model/weights.safetensors && chmod -R a+rX /model && cd / \
 && python -c "import automl_cv.commands; from automl_cv.serve import run_step; print(run_step('/'))" \
 && python /src/sbom.py /model > /opt/automl_cv/sbom.cdx.json

FROM python:3.12-slim
ARG REVISION="" MODEL="" MODEL_SHA256=""
LABEL org.opencontainers.image.title="automl_cv" \
      org.opencontainers.image.description="An image classifier behind HTTP" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="$REVISION" \
      automl_cv.model.name="$MODEL" \
      automl_cv.model.sha256="$MODEL_SHA256"
ENV PATH=/opt/automl_cv/bin:$PATH PYTHONPYCACHEPREFIX=/opt/automl_cv/bytecode PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 HOST=0.0.0.0 PORT=8080 AUTOML_CV_MODEL=/model AUTOML_CV_HOME=/tmp/automl_cv \
    OPENBLAS_NUM_THREADS=1
COPY --from=build /opt/automl_cv /opt/automl_cv
COPY --from=build /model /model
USER 10001:10001
# The one place that is written to: uploads over 1 MB wait here. It stays writable when the root is read-only.
VOLUME /tmp
EXPOSE 8080
# An exec form, so that the server itself gets SIGTERM; it reads PORT.
CMD ["python", "-m", "automl_cv.serve"]
