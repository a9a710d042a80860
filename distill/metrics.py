"""`metrics.jsonl`: one JSON object a line, one line a step or evaluation; and its picture."""

import json
from pathlib import Path

from accelerate import Accelerator

from distill.files import write_text_atomically

_PANELS = {
    "KL(teacher || student), nats a row": ("train/kl_nats", "eval/kl_nats"),
    "cross-entropy, nats a row": ("train/ce_nats", "eval/ce_nats"),
    "share of rows with the teacher's likeliest token": ("train/agreement", "eval/agreement"),
}


class MetricsLog:
    """Appends to the file; on resuming, lines of steps about to be repeated are dropped."""

    def __init__(self, path: Path, first_step: int, accelerator: Accelerator) -> None:
        self._path, self._accelerator = path, accelerator
        if not accelerator.is_main_process:
            return
        old = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in old if json.loads(line)["step"] <= first_step]
        write_text_atomically(path, "".join(line + "\n" for line in kept))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values measured at `step`, here and in every tracker (main process only)."""
        if self._accelerator.is_main_process:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)

    def plot(self, path: Path) -> None:
        """Draw losses and agreement over the steps as a PNG (main process only)."""
        if not self._accelerator.is_main_process:
            return
        from matplotlib.figure import Figure  # without pyplot: no window, no global state

        lines = [json.loads(line) for line in self._path.read_text().splitlines()]
        figure = Figure(figsize=(7, 8), layout="constrained")
        for axes, (title, names) in zip(
            figure.subplots(3, sharex=True), _PANELS.items(), strict=True
        ):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                marker = "o" if len(points) < 50 else ""
                axes.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3)
            axes.set_title(title, fontsize=10)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        axes.set_xlabel("step")
        figure.savefig(path, dpi=120)
