"""Print the bill of materials of the image under construction as CycloneDX 1.5: packages, Debian, the model."""
import json
import platform
import re
import sys
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from pathlib import Path
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid5

Component = dict[str, object]


def component(kind: str, name: str, version: str, purl: str = "", **more: object) -> Component:
    """Describe one part."""
    known = {"type": kind, "bom-ref": purl or f"{name}@{version}", "name": name, "version": version}
    return known | ({"purl": purl} if purl else {}) | more


def python_package(found: Distribution) -> Component:
    """Describe an installed package. A licence that is a whole text is left out."""
    name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
    expression, text = (found.metadata.get(key) for key in ("License-Expression", "License"))
    licence = {"expression": expression} if expression else {"license": {"name": text}}
    named = expression or (text and len(text) < 60)
    return component("library", name, found.version, f"pkg:pypi/{name}@{quote(found.version)}",
                     **({"licenses": [licence]} if named else {}))


def debian_packages(status: Path = Path("/var/lib/dpkg/status")) -> list[Component]:
    """Describe what dpkg installed."""
    found = []
    for part in status.read_text(encoding="utf-8").split("\n\n") if status.exists() else []:
        facts = dict(re.findall(r"^(Package|Version|Architecture|Status): (.+)$", part, re.M))
        if facts.get("Status", "").endswith(" installed"):
            name, version = facts["Package"], facts["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={facts['Architecture']}"
            found.append(component("library", name, version, purl))
    return found


def model(bundle: Path) -> Component:
    """Describe the model by the content of its graph."""
    info, digest = json.loads((bundle / "model.json").read_text()), sha256((bundle / "model.onnx").read_bytes())
    return component("machine-learning-model", info["name"], digest.hexdigest()[:12],
                     hashes=[{"alg": "SHA-256", "content": digest.hexdigest()}])


def bill(bundle: Path) -> dict[str, object]:
    """List everything, with the packages in the order of their names; the same parts make the same bill."""
    packages = sorted((python_package(d) for d in distributions()), key=lambda c: str(c["name"]))
    ours = next(c for c in packages if c["name"] == "automl-cv")
    packages.remove(ours)
    parts = [model(bundle), component("platform", "python", platform.python_version()), *packages,
             *debian_packages()]
    serial = uuid5(NAMESPACE_URL, json.dumps([ours, parts]))
    return {"$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json", "bomFormat": "CycloneDX",
            "specVersion": "1.5", "serialNumber": f"urn:uuid:{serial}", "version": 1,
            "metadata": {"component": ours | {"type": "application"}}, "components": parts}


if __name__ == "__main__":
    print(json.dumps(bill(Path(sys.argv[1])), indent=1))
