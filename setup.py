"""Build the package from settings.ini, the one place that holds its metadata (nbdev's template needs pkg_resources)."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(root / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
names = ("serve", "cli", "gpu", "train", "timm", "heif", "gcs", "s3", "otel", "openvino", "postgres", "dev")
extras = {name: cfg[f"{name}_requirements"].split() for name in names}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["automl_cv", "automl_cv.*"]),
    package_data={"automl_cv": ["templates/*", "static/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
