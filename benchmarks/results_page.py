"""The results page: tables made from the JSON files that the benchmarks write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

METHODS = {"no_adaptation": "none", "augmentation_only": "random contrasts", "adapted": "adapted", "oracle": "oracle"}
SITE_METHODS = ("synthetic_only", "adapted")


def page(folder: Path) -> str:
    """The page in Markdown, with a section for each result file in the folder."""
    parts = [
        "# All tables\n",
        "Made by `benchmarks/study.py --page` of the JSON files in `benchmarks/results`, which also hold machine,",
        "versions and seeds. Dice is the mean over structures and held-out subjects; brackets are 95 % intervals, or",
        "single seeds. How each was measured is in the head of its script; what it means, on the pages about it.\n",
        "`benchmarks/study.py --data FOLDER --work study` runs all of it again, in about 16 hours on two cores;",
        "`--small` runs short versions, in eleven minutes.\n",
    ]
    for name, (title, make) in SECTIONS.items():
        if (folder / f"{name}.json").is_file():
            content = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            parts += [f"## {title}\n", f"`{name}.json`\n", *make(content), ""]
    return "\n".join(parts).rstrip() + "\n"


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def number(value: float | None, digits: int = 3) -> str:
    """A number as the documentation writes shares, such as .123; nothing for None."""
    if value is None:
        return ""
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("0.") else text


def demo(content: dict[str, Any]) -> list[str]:
    rows = []
    for domain, methods in content["dice"].items():
        rows.append([domain, *(f"{number(np.mean(methods[m]))} ({_listed(methods[m])})" for m in METHODS)])
    seconds = ", ".join(f"{value:.0f}" for value in content["seconds"])
    busy = " on a machine with other work beside" if content.get("busy") else ""
    last = f"Mean (seeds {_seeds(content['seeds'])}); {seconds} s{busy}."
    return [*table(["domain", *METHODS.values()], rows), "", last]


def shared_anatomy(content: dict[str, Any]) -> list[str]:
    """Mean Dice of every variant at every unlabelled site, and then of the methods without a factory."""
    seeds = content["seeds"]
    labelled, *sites = list(seeds[0]["baselines"]["dice"])
    rows = []
    for variant in content["variants"]:
        runs = [(seed["runs"][variant], seed["baselines"]["dice"]) for seed in seeds if variant in seed["runs"]]
        if not runs:
            continue
        above = sum(
            all(run["dice"][site]["adapted"] > base[site]["augmentation_only"] for site in sites) for run, base in runs
        )
        cells = [
            " / ".join(number(np.mean([run["dice"][site][key] for run, _ in runs]), 2) for key in SITE_METHODS)
            for site in sites
        ]
        share = np.mean([run["dice"][site]["adapted"] / base[site]["oracle"] for run, base in runs for site in sites])
        shared = [
            value
            for run, _ in runs
            for pair, value in run["evaluations"][-1]["shared"].items()
            if labelled in pair.split("/")
        ]
        anatomy = f"{number(min(shared), 2)} to {number(max(shared), 2)}"
        name = variant.replace("_", " ")
        rows.append([name, len(runs), f"{above} of {len(runs)}", *cells, f"{share:.0%}", anatomy])
    for method in ("no_adaptation", "augmentation_only", "oracle"):
        means = [number(np.mean([seed["baselines"]["dice"][site][method] for seed in seeds]), 2) for site in sites]
        rows.append([f"*{METHODS[method]}*", len(seeds), "", *means, "", ""])
    head = ["variant", "seeds", "above random contrasts at both sites"]
    head += [f"{site}: synthetic alone / adapted" for site in sites]
    head += ["of the oracle", f"anatomy shared with {labelled}"]
    alarm = ", ".join(f"{key}: {value}" for key, value in content["alarm"].items())
    return [*table(head, rows), "", f"Alarm over all sites and runs: {alarm}."]


def factory_value(content: dict[str, Any]) -> list[str]:
    """What sites have with and without factories of several kinds, the differences, and what an attacker learns."""
    seeds = content["seeds"]
    variants = list(seeds[0]["variants"])
    rows = []
    for site in list(seeds[0]["baselines"]["scores"])[1:]:
        for variant, (key, start) in itertools.product(
            ("", *variants), (("scores", ""), ("scores_in_full", ", in full"))
        ):
            found = [(s["variants"][variant] if variant else s["baselines"]).get(key, {}).get(site, {}) for s in seeds]
            for row in found[0]:
                dice = [one[row]["dice"] for one in found]
                what = row.replace("_", " ") + start
                rows.append([site, variant.replace("_", " "), what, number(np.mean(dice)), _listed(dice, 3)])
    lines = [*table(["site", "factory", "segmenter", "Dice", "by seed"], rows), ""]
    on_cpu = content.get("device", "cpu") == "cpu"
    for row in content["differences"]:
        mean, low, high = (f"{row[key]:+.3f}".replace("0.", ".") for key in ("mean", "low", "high"))
        compared = f"{row['variant']}: {row['row']} less {row['against']}, {row['updates']}".replace("_", " ")
        lines.append(f"* {compared}: {mean} ({low} to {high}), {row['patients']} patients, {row['seeds']} seeds")
    rows = []
    for variant in variants:
        found = [s["variants"][variant] for s in seeds]
        shared = {pair: np.mean([one["shared_anatomy"][pair] for one in found]) for pair in found[0]["shared_anatomy"]}
        seen = {site: np.mean([one["drawn_labels"][site] for one in found]) for site in found[0]["drawn_labels"]}
        areas = [one["privacy"]["features"]["attack_area"] for one in found]
        rows.append([
            variant.replace("_", " "),
            ", ".join(f"{pair} {number(value, 2)}" for pair, value in shared.items()),
            ", ".join(f"{site} {number(value, 2)}" for site, value in seen.items()),
            "; ".join(f"{number(a['value'], 2)} ({number(a['low'], 2)} to {number(a['high'], 2)})" for a in areas),
            round(np.mean([one["cpu_seconds"]["factory"] for one in found])) if on_cpu else "on a GPU",
        ])  # fmt: skip
    head = ["factory", "shared anatomy", "drawn labels seen again by oracles", "attack area, by seed", "CPU seconds"]
    return [*lines, "", *table(head, rows)]


def cardiac(content: dict[str, Any]) -> list[str]:
    rows = []
    for site, methods in content["mean"].items():
        for method, row in methods.items():
            by_seed = [seed[site][method]["dice"] for seed in content["seeds"].values()]
            structures = [number(row[key], 2) for key in row if key.startswith("dice ")]
            share = f"{row['dice'] / methods['oracle']['dice']:.0%}"
            name = METHODS.get(method, method)
            rows.append([site, name, number(row["dice"]), _listed(by_seed), *structures, f"{row['hd95']:.1f}", share])
    head = [
        "site",
        "method",
        "Dice",
        "by seed",
        "right ventricle",
        "myocardium",
        "left ventricle",
        "HD95 (mm)",
        "of oracle",
    ]
    return table(head, rows)


def engine(content: dict[str, Any]) -> list[str]:
    """Dice of every method at every site, and its share of the oracle of 3,500 updates."""
    rows = []
    for place, methods in content["methods"].items():
        for name, entry in methods.items():
            share = low_high = ""
            if "share_of_oracle" in entry:
                share = f"{entry['share_of_oracle']:.0%}"
                low_high = " to ".join(f"{value:.0%}" for value in entry["interval"])
            rows.append([place, name, number(entry["mean"]), _listed(entry["dice"].values(), 3), share, low_high])
    return table(["site", "method", "Dice", "by seed", "of the oracle", "95 % interval"], rows)


def networks(content: dict[str, Any]) -> list[str]:
    rows = [
        [name, row["seconds_to_target"], row["seconds"], number(row["dice"]), f"{row['volumes_per_second']:.3g}"]
        for name, row in content["networks"].items()
    ]
    return table(
        ["network", f"seconds to {number(content['target'], 1)}", "seconds in all", "Dice", "volumes a second"], rows
    )


def steps(content: dict[str, Any]) -> list[str]:
    rows = [
        [row["size"], f"{row['seconds']['ours']['step']:.2f}", f"{row['seconds']['twin']['step']:.2f}",
         f"{row['ratio']['step']:.2f}", f"{row['share_of_matmul_rate']['ours']:.0%}"]
        for row in content["sizes"]
    ]  # fmt: skip
    return table(["px", "seconds a step", "textbook twin", "ratio", "of the measured matrix rate"], rows)


def volumes(content: dict[str, Any]) -> list[str]:
    rows = [
        [row["size"], *(f"{row['seconds_per_volume'][who]:.2f}" for who in ("ours", "twin")), f"{row['ratio']:.2f}"]
        for row in content["sizes"]
    ]
    return table(["px", "seconds a volume", "textbook twin", "ratio"], rows)


def synthesis(content: dict[str, Any]) -> list[str]:
    ways = {**content["ours"], "the published way": {**content["published"], "ratio": 1.0}}
    rows = [
        [name.replace("_", ", "), f"{way['volumes_per_second']:.3f}", f"{way['ratio']:.1f}", f"{way['peak_mib']:.0f}"]
        for name, way in ways.items()
    ]
    parts = [[name.replace("_", " "), f"{seconds:.2f}"] for name, seconds in content["seconds_by_part"].items()]
    return [
        *table(["labels by", "labelled volumes a second", "ratio", "peak MiB"], rows),
        "",
        *table(["part of a volume", "seconds on one core"], parts),
    ]


def distilled(content: dict[str, Any]) -> list[str]:
    rows = [
        [row["seed"], row["branches"], f"{row['distilled']['equal_pixels']:.4f}",
         ", ".join(f"{score:.3f}" for score in row["distilled"]["dice"]),
         *(f"{row['equal_pixels_of_bfloat16'][who]:.5f}" for who in ("ensemble", "distilled")),
         *(f"{row['dice_with_oracle'][who]:.3f}" for who in ("ensemble", "distilled"))]
        for row in content["rows"]
    ]  # fmt: skip
    columns = ["equal pixels, distilled", "Dice by class, distilled", "equal pixels, bfloat16", "distilled, bfloat16"]
    return table(["seed", "branches", *columns, "Dice with the oracle", "distilled"], rows)


def trees(content: dict[str, Any]) -> list[str]:
    rows = [
        [row["side"], row["image"], row["depth"], f"{row['filter']:.2f}", f"{row['filter_level_by_level']:.1f}",
         f"{row['largest_difference']:.0e}"]
        for row in content["rows"]
    ]  # fmt: skip
    return table(["px", "image", "depth of the tree", "seconds", "level by level", "difference"], rows)


def preparing(content: dict[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{row['seconds']:.1f}",
            f"{row['slices_per_second']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['ratio']:.1f}",
        ]
        for name, row in content["variants"].items()
    ]
    return table(["way", "seconds", "slices a second", "peak MiB", "times the twin"], rows)


def pictures(content: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{row['pictures_per_second']:.0f}", f"{row['ratio']:.2f}", f"{row['peak_mib']:.0f}"]
        for name, row in content["variants"].items()
    ]
    fewer = f"Of a quarter of the pictures the peak is {content['peak_mib_of_a_quarter_of_the_pictures']:.0f} MiB."
    return [*table(["way", "pictures per second", "ratio", "peak MiB"], rows), "", fewer]


def versions(content: dict[str, Any]) -> list[str]:
    rows = [
        [f"{name} ({content['commits'][name]})", *(f"{row[key]:.1f}" for key in ("seconds", "processor_seconds")),
         f"{row['peak_mib']:.0f}"]
        for name, row in content["versions"].items()
    ]  # fmt: skip
    ratios = content["ratios"]
    text = (
        f"{content['cases']} cases: {ratios['seconds']:.2f} times as fast, {ratios['processor_seconds']:.2f} times by "
        "processor time (medians of the pairs)."
    )
    return [*table(["version (commit)", "seconds", "processor seconds", "peak MiB"], rows), "", text]


def rounds(content: dict[str, Any]) -> list[str]:
    keys = ("seconds_beside_training", "mib_to_each_site", "mib_from_each_site", "researcher_peak_mib")
    rows = [
        [name.replace("_", ", "), *(row.get(key, "did not end") for key in keys)]
        for name, row in content["variants"].items()
    ]
    head = ["traffic", "seconds beside training", "MiB to a site", "MiB from a site", "researcher's peak MiB"]
    return table(head, rows)


def transports(content: dict[str, Any]) -> list[str]:
    """What eight bits do to the factory and to what its slices teach, by seed."""
    rows = []
    for seed in content["seeds"]:
        for name, run in seed["runs"].items():
            quality, dice = run["evaluations"][-1]["quality"], run["dice"]
            rows.append([
                seed["seed"], content["variants"][name]["transport"],
                ", ".join(f"{domain} {row['distance']:.1f}" for domain, row in quality.items()),
                *(", ".join(f"{domain} {number(row[method])}" for domain, row in dice.items())
                  for method in SITE_METHODS),
            ])  # fmt: skip
    return table(["seed", "transport", "kernel distance", "Dice, synthetic alone", "Dice, adapted"], rows)


def ten_rounds(content: dict[str, Any]) -> list[str]:
    """The parts of a round, by version."""
    parts = ("training", "at the node", "between", "round", "ten rounds")
    rows = [[f"{name} ({content['commits'][name]})", *(f"{row[part]:.2f}" for part in parts)]
            for name, row in content["versions"].items()]  # fmt: skip
    faster = f"Ten rounds are {content['ratio']:.2f} times as fast."
    text = f"Seconds; runs of each version, in turns: {content['repeats']}. {faster}"
    return [*table(["version (commit)", *parts], rows), "", text]


def starts(content: dict[str, Any]) -> list[str]:
    """Seconds until a command answers."""
    rows = [[name, *(f"{row[key]:.2f}" for key in ("wall", "processor", "fresh_wall"))]
            for name, row in content["seconds"].items()]  # fmt: skip
    return table(["command", "seconds", "of the processor", "first start"], rows)


def attacks(content: dict[str, Any]) -> list[str]:
    """What each attack learns, by the way of protection, and the Dice of an honest study."""
    rows = [[f"labels by scores, one day: {way}", "share of right pixels", number(value)]
            for way, value in content["labels"].items()]  # fmt: skip
    for way, row in content["layouts"].items():
        what = f"correlation with the mean slices, {row['answers']} answers"
        rows.append([f"grey values by the layout number, one day: {way}", what, number(row["correlation"])])
    for way, row in content["pixels"].items():
        beside = ", ".join(number(row[key]) for key in ("attacked_beside_mean", "others"))
        what = "correlation with the attacked slice; without the mean slice, and by chance"
        rows.append([f"pixels in averaged weights: {way}", what, f"{number(row['attacked'])}; {beside}"])
    for way in ("unprotected", "protected"):
        dice = content["honest_dice"][way]
        rows.append([f"an honest fedavg: {way}", "Dice", f"{number(np.mean(dice))} ({_listed(dice, 3)})"])
    study = f"fedavg of two sites, {content['rounds']} rounds of {content['updates']} updates"
    seeds = f"{content['slices']} slices; {study}, seeds {_seeds(content['seeds'])}."
    return [*table(["attack", "measured", "value"], rows), "", seeds]


def sites(content: dict[str, Any]) -> list[str]:
    rows = [
        [row["sites"], f"{row['streaming']['seconds']:.1f}", row["streaming"]["mib_above_start"],
         f"{row['in_memory']['seconds']:.1f}", row["in_memory"]["mib_above_start"]]
        for row in content["rounds"]
    ]  # fmt: skip
    return table(["sites", "seconds", "MiB", "seconds, all in memory", "MiB, all in memory"], rows)


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "demo_seeds": ("The demo", demo),
    "shared_anatomy": ("Do labels carry over? Simulated brains", shared_anatomy),
    "shared_anatomy_cardiac": ("Do labels carry over? Cardiac sites", shared_anatomy),
    "factory_value_brains": ("What a factory is worth: simulated brains", factory_value),
    "factory_value_cardiac": ("What a factory is worth: cardiac sites", factory_value),
    "factory_value_brains_in_full": (
        "What a factory is worth: simulated brains, with a first guess of all its updates",
        factory_value,
    ),
    "cardiac_study": ("Phase two on the cardiac sites", cardiac),
    "segmentation_engine": ("The segmentation engine", engine),
    "adaptation_cpu": ("Time to a segmenter", networks),
    "factory_step_cpu": ("A step of the published generator", steps),
    "generator_speed_cpu": ("Volumes by the published generator", volumes),
    "synthesis_cpu": ("Labelled volumes", synthesis),
    "distilled_labels": ("Labels of a distilled branch and of half precision", distilled),
    "tree_filter_cpu": ("Tree filter, one core", trees),
    "prepare_cpu": ("Preparing", preparing),
    "prepare_pictures_cpu": ("Preparing pictures", pictures),
    "prepare_versions": ("Preparing, beside an earlier version", versions),
    "round_overhead_10m": ("A round of 10 M parameters, four nodes", rounds),
    "round_overhead_25m": ("A round of 25 M parameters, four nodes", rounds),
    "transport_quality": ("Weights in eight bits: the factory and its slices", transports),
    "ten_rounds": ("Ten rounds of the demo, beside an earlier version", ten_rounds),
    "start_time": ("Seconds until a command answers", starts),
    "many_sites": ("Averaging many sites", sites),
    "attacks": ("What attacks on a site learn", attacks),
}


def _seeds(seeds: list[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _listed(values: Iterable[float], digits: int = 2) -> str:
    return ", ".join(number(value, digits) for value in values)
