"""`eagle COMMAND …`: the entry points under one roof. Imports nothing until a command is chosen."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "generate": ("inference.generate", "generate from a prompt or a file"),
    "bench": ("inference.bench", "measure: engines, cycle, slots, train, sandbox, gpu, model"),
    "evaluate": ("inference.evaluate", "pass@k of programs, metrics of tasks and texts"),
    "train": ("train.main", "train a draft head"),
    "finetune": ("train.finetune", "fine-tune a base model: sft, multitask, dpo, merge"),
    "inspect": ("train.inspect", "show training samples with the supervised tokens coloured"),
    "doctor": ("train.doctor", "check the installation, a target, data and a head"),
    "prepare": ("train.prepare", "write features or answers of the target before training"),
    "report": ("train.report", "write the page of a training run again"),
    "convert": ("inference.convert", "rewrite a head for another engine, or probe its layer ids"),
    "inspect head": ("inference.inspect_head", "show what a head is and what it belongs to"),
}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: eagle COMMAND [--flag value …]\n")
        for name, (_, text) in COMMANDS.items():
            print(f"  {name:<12} {text}")
        sys.exit(0 if arguments else 2)
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    command, arguments = " ".join(arguments[:words]), arguments[words:]
    if command not in COMMANDS:
        sys.exit(f"error: unknown command {command!r}; one of {', '.join(COMMANDS)}")
    module, _ = COMMANDS[command]
    sys.argv = [f"python -m {module}", *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=False)
