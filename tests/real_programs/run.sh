#!/usr/bin/env bash
# Exports in the real programs on a CPU: llama.cpp (llama-cpp-python, which pip builds), mlx-lm and OpenVINO GenAI,
# beside PEFT. Prints the table of docs/exporting.md. Needs the project's environment with [test] active,
# ../shared/wild/bases/stories260K, a network for pip, and 4 GB in DIR.
#
#     tests/real_programs/run.sh [DIR]
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(realpath "${1:-$(mktemp -d)}")
install() {
    [[ -x $work/$1/bin/python ]] || python3 -m venv "$work/$1"
    "$work/$1/bin/pip" install -q "${@:2}"
}
install llama llama-cpp-python==0.3.36
install mlx mlx-lm==0.32.2 'mlx[cpu]==0.32.4'
install openvino openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 openvino==2026.4.1 \
    optimum-intel==2.2.0 transformers==5.5.4 'torch>=2.13,<2.14'
# optimum-intel brings a torchvision for CUDA; beside a torch for CPUs transformers fails to import it, without it transformers does.
"$work/openvino/bin/pip" uninstall -q -y torchvision
REAL_PROGRAMS=$work python3 -m pytest -q -n 0 -m real tests/real_programs
cat "$work"/*.md
