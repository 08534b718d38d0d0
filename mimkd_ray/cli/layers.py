"""The table of the layers of a network that can be tapped: `python -m mimkd_ray layers NAME`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mimkd_ray.cli.command_line import parsed
from mimkd_ray.errors import UserError
from mimkd_ray.taps.default_stages import before_activation, default_taps
from mimkd_ray.taps.dry_checks import build_without_weights
from mimkd_ray.taps.dry_run import dry_run
from mimkd_ray.taps.tapped_model import TapShape, find_shapes


def main(argv: Sequence[str], program: str) -> int:
    """Print the table for a command line; return the exit status. Raises UserError."""
    parser = argparse.ArgumentParser(prog=program, description="List the layers of a network that can be tapped.")
    parser.add_argument("name", help="resnet34, cifar/resnet20, timm/NAME or package.module:function")
    parser.add_argument("--image-size", type=int, help="pixels (default: 32 for cifar/, 224 otherwise)")
    parser.add_argument("--num-classes", type=int, default=1000, help="default: 1000")
    parser.add_argument("--all", action="store_true", help="every layer, not just stages and default taps")
    options = parsed(parser, argv)
    if options is None:
        return 0
    print("\n".join(layer_table(options.name, options.image_size, options.num_classes, options.all)))
    return 0


def layer_table(name: str, image_size: int | None, num_classes: int, every: bool) -> list[str]:
    """Return the lines of the table: path, kind, shape, kB (1000 bytes) per image at two bytes a value, default tap.

    Unless `every`, only layers of depth 1, containers of depth 2 and default taps are listed. The last line explains
    the names of inputs and lists the default taps before their activation. Raises UserError.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: expected at least 1 pixel")
    side = image_size or (32 if name.startswith("cifar/") else 224)
    model = build_without_weights(name, num_classes, image_size, side)
    run = dry_run(model, side)
    shapes = find_shapes(model, side, run=run)
    stages = default_taps(model, side, run)
    marks = dict.fromkeys(stages.maps, "map")
    marks[stages.vector] = "map, vector" if stages.vector in marks else "vector"
    modules = dict(model.named_modules(remove_duplicate=False))

    def shown(path: str) -> bool:
        depth = path.count(".") + 1
        container = next(modules[path].children(), None) is not None
        return every or path in marks or depth == 1 or (depth == 2 and container)

    def size(shape: TapShape) -> str:
        if shape.kind == "vector":
            return str(shape.channels)
        if shape.kind == "tokens":
            tokens = f"{shape.height}*{shape.width}"
            return f"({tokens}+{shape.prefix})x{shape.channels}" if shape.prefix else f"({tokens})x{shape.channels}"
        sides = (shape.height, shape.width)
        return "x".join(map(str, (*sides, shape.channels) if shape.channels_last else (shape.channels, *sides)))

    rows = [("layer", "kind", "shape", "kB/image", "default tap")]
    for path, shape in shapes.items():
        if shown(path):
            rows.append(
                (
                    path,
                    shape.kind,
                    size(shape),
                    f"{shape.values_per_image * 2 / 1000:.1f}",
                    marks.get(path, ""),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [f"{name}, images of {side}x{side}: {len(rows) - 1} of {len(shapes)} layers"]
    for row in rows:
        cells = [
            cell.rjust(width) if column == 3 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    before = [tap for name, tap in before_activation(model, side, list(marks)).items() if tap != name]
    inputs = "LAYER@input is what a layer is given"
    lines.append(f"{inputs}; default taps before their activation: {' '.join(before)}" if before else inputs)
    return lines
