"""pytest with the extension of another folder: `sanitize.py FOLDER pytest-arguments...`

`make sanitize` runs it with a build whose errors end the process.
"""

import importlib.util
import sys
from pathlib import Path

import pytest


def main() -> int:
    folder, *arguments = sys.argv[1:]
    (path,) = Path(folder).glob("_C.*.so")
    spec = importlib.util.spec_from_file_location("genai_perf._C", path)
    sys.modules["genai_perf._C"] = extension = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    spec.loader.exec_module(extension)
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
