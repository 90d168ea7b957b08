"""Check that cleaning and exporting the notebooks changes nothing, then run all of them.

Works on a copy of the checkout: a check must not mend what it checks.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def call(name: str, *words: str, cwd: Path) -> None:
    """Run one of nbdev's commands on one thread per process: notebooks run in parallel."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    env = os.environ | threads | {"PYTHONPATH": str(cwd), "MPLBACKEND": "agg"}
    subprocess.run([BIN / name, *words], cwd=cwd, env=env, check=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Read the notebooks and the modules of a checkout."""
    files = [*folder.glob("nbs/*.ipynb"), *folder.glob("automl_cv/*.py")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def main() -> None:
    """Clean, export, compare, run."""
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room, "checkout")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "outputs", "__pycache__"))
        for module in copy.glob("automl_cv/*.py"):
            if module.name != "__init__.py":
                module.unlink()
        call("nbdev_clean", cwd=copy)
        call("nbdev_export", cwd=copy)
        before, after = contents(ROOT), contents(copy)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if changed:
            sys.exit(f"clean or export changed {', '.join(changed)}: run nbdev_clean and nbdev_export, and commit")
        print("clean and export change nothing", flush=True)
        call("nbdev_test", "--n_workers", "2", "--do_print", "--timing", cwd=copy)


if __name__ == "__main__":
    main()
