# SPDX-License-Identifier: Apache-2.0
"""Recordings of a person to try models of sound on: the voice that Debian's alsa-utils tests loudspeakers with.

    python examples/recordings.py      # fetches the package once (1 MB, kept under build/alsa/)

Eight recordings of a second and a half: "front left", "rear centre" and the like.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import UserError, run_main
from torch import Tensor

from pycore.models.codec_audio import read_wav, resample

NAME = "recordings"
PACKAGE, INSIDE = "alsa-utils", Path("usr/share/sounds/alsa")
FOLDER = Path(__file__).resolve().parents[1] / "build" / "alsa"


def recordings(folder: Path = FOLDER) -> list[Path]:
    """The recordings that are there, of the system or fetched; none where there are none."""
    for root in (Path("/"), folder):
        found = sorted(path for path in (root / INSIDE).glob("*_*.wav"))
        if found:
            return found
    return []


def read(path: Path, sample_rate: int) -> Tensor:
    """A WAV file's samples [n] at that rate."""
    try:
        sound, rate = read_wav(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    return resample(sound, rate, sample_rate)


def fetch(folder: Path = FOLDER) -> None:
    """Fetches the package from the system's own Debian mirror and takes the recordings out of it; installs nothing."""
    if recordings(folder):
        return
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program} is not here; the recordings come from the package {PACKAGE} of Debian or Ubuntu"
            )
    with tempfile.TemporaryDirectory() as place:
        for command in (["apt-get", "download", PACKAGE], ["sh", "-c", 'dpkg -x "$1"*.deb .', "sh", PACKAGE]):
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                said = (done.stderr.strip() or done.stdout.strip()).splitlines()
                raise UserError(f"{' '.join(command[:2])} failed ({said[-1] if said else 'it does not say why'})")
        (folder / INSIDE).mkdir(parents=True, exist_ok=True)
        for path in (Path(place) / INSIDE).glob("*.wav"):
            shutil.copy(path, folder / INSIDE / path.name)
    if not recordings(folder):
        raise UserError(f"{PACKAGE} has no recordings at {INSIDE}, where they were once")


def run() -> int:
    """Fetches, and says what is there."""
    fetch()
    for path in recordings():
        sound = read(path, 16000)
        print(f"{path}  {len(sound) / 16000:.2f} s, peak {float(torch.amax(sound.abs())):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(NAME, run))
