# syntax=docker/dockerfile:1
# The service around one bundle: no torch, no compiler, no root.
#   docker build --build-arg BUNDLE=outputs/runs/demo/model -t automl_cv .
FROM python:3.12-slim AS build
WORKDIR /src
COPY constraints.txt setup.py settings.ini pyproject.toml README.md ./
COPY automl_cv automl_cv
RUN python -m venv /opt/automl_cv \
 && /opt/automl_cv/bin/pip install --no-cache-dir -c constraints.txt ".[serve]" \
 && /opt/automl_cv/bin/pip uninstall -y pip

FROM python:3.12-slim
ARG BUNDLE=outputs/runs/demo/model
ENV PATH=/opt/automl_cv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 PORT=8080 AUTOML_CV_MODEL=/model
COPY --from=build /opt/automl_cv /opt/automl_cv
COPY ${BUNDLE} /model
USER 10001:10001
EXPOSE 8080
# An exec form, so that the server itself gets SIGTERM; it reads PORT.
CMD ["python", "-m", "automl_cv.serve"]
