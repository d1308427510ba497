"""Time and peak memory of every part, next to its floor and to the naive form in naive.py, on the machine at hand.

    python benchmarks/speed.py            everything but recipes
    python benchmarks/speed.py recipes [NAME ...]    a training step of files in configs/ (all), at their own batch
    python benchmarks/speed.py plot       docs/speed.png alone

Each row times its columns in turn, several rounds in one run, and takes medians: the ratios are the figures. The
floor of training, of labelling and of plain evaluation is the network alone, at the same precision and layout.
Writes docs/speed.png: cost against image size, boxes and classes (needs matplotlib).
"""
import ctypes
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import naive  # noqa: E402

import datasets  # noqa: E402
import engine  # noqa: E402
import losses  # noqa: E402
import make_labels  # noqa: E402
import models  # noqa: E402
import settings  # noqa: E402
import train_cls  # noqa: E402
import train_seg  # noqa: E402
from crf import dense_crf  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
BATCH = 20 if GPU else 2  # crops of a training step
CROP, SIZE, CLASSES = 321, (375, 500), 20
# Of the chart: boxes in two crops, sides of an image, labels.
COUNTS, SIDES, LABELS = (1, 5, 20, 50, 100, 200), (128, 192, 256, 384, 512), (2, 5, 20, 50, 100, 200)
WORKERS = min(8, os.cpu_count() or 1)  # run.workers of configs/voc_vgg16.yaml
RECIPES = "voc2007", "voc_vgg16", "voc_resnet101", "your_data"  # files of configs/
FORMS = "fp32", "bf16", "bf16, compiled"  # of a training step; its floor is at the same precision, not compiled


def clock(*functions, rounds=5):
    """Median seconds of each, run in turn."""
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for function, taken in zip(functions, times):
            if GPU:
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if GPU:
                torch.cuda.synchronize()
            taken += [time.perf_counter() - start] * (n > 0)  # the first round warms up
    return [statistics.median(taken) for taken in times]


def title(text, *columns):
    print(f"\n| {text} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}", flush=True)


def row(name, *values):
    print(f"| {name} | {' | '.join(v if isinstance(v, str) else f'{v:.3g}' for v in values)} |", flush=True)


def peak(case):
    """MB that a case of MEMORY needs at most, beyond what it starts from; on a CPU in a process of its own."""
    if not GPU:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(resident_peak, (case,))
    run = MEMORY[case]()
    run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_peak(case):
    run = MEMORY[case]()
    run()  # libraries and buffers that stay are there after the first time
    status = lambda key: int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) / 1e3  # noqa: E731
    peaks = []
    for _ in range(3):  # the least of three: what the allocator happens to keep counts as resident, too
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
        before = status("VmRSS:")
        run()
        peaks.append(status("VmHWM:") - before)
    return min(peaks)


# ---------------------------------------------------------------- what is measured


def random_boxes(count, size, seed=0):
    corners = np.random.default_rng(seed).random((count, 2, 2)) * size[::-1]
    low, high = corners.min(1), corners.max(1)
    return torch.tensor(np.concatenate((low, np.minimum(high + 16, size[::-1])), 1), dtype=torch.float32)


def labels_of(shape, labels, differ=0.2):
    """Ycrf and Yret (N, H, W) of blobs, as labels are."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(labels, (2, shape[0], 1, 8, 8), generator=g).float()
    y = F.interpolate(coarse.flatten(0, 1), shape[1:], mode="nearest")[:, 0].long().view(2, *shape)
    return y[0].to(DEVICE), torch.where(torch.rand(shape, generator=g) < differ, y[1], y[0]).to(DEVICE)


def stage_1(form, s=None, classes=CLASSES):
    """-> (a whole training step, the backbone's forward and backward), with settings s."""
    s = s or settings.TrainCls(batch=BATCH, crop=CROP)
    network = models.BoxClassifier(classes, s.backbone, width=s.width, dropout=s.dropout)
    boxes = [random_boxes(5 if i % 2 else 0, (s.crop, s.crop), i) for i in range(s.batch)]
    batch = dict(boxes=boxes, labels=[torch.ones(len(b), dtype=torch.int64) for b in boxes],
                 background=models.outside_boxes(boxes, (s.crop, s.crop)).byte())
    return training_step(s, network, batch, train_cls.objective, form)


def stage_3(form, s=None, classes=CLASSES):
    s = s or settings.TrainSeg(batch=BATCH, crop=CROP)
    network = models.DeepLab(1 + classes, s.backbone, width=s.width, dropout=s.dropout)
    y_crf, y_ret = labels_of((s.batch, s.crop, s.crop), 1 + classes)
    loss = lambda network, b: {"loss": train_seg.segmentation_loss(s, network(b["image"]), y_crf, y_ret)}  # noqa: E731
    return training_step(s, network, {}, loss, form)


def training_step(s, network, batch, loss, form):
    network.freeze_norm = s.freeze_norm  # as with pretrained weights
    network.train().to(DEVICE, memory_format=torch.channels_last)
    optimizer = engine.build_optimizer(network, s)
    shape = s.batch, 3, s.crop, s.crop
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch["image"] = image.to(DEVICE, memory_format=torch.channels_last)
    normal = cache(lambda: torch.randn(shape, device=DEVICE).contiguous(memory_format=torch.channels_last))
    config = SimpleNamespace(device=DEVICE, run=settings.Run(precision="bf16" if "bf16" in form else "fp32"))
    backbone = network.backbone.forward  # the floor is never compiled
    if "compile" in form:
        network.backbone.compile()

    def step():
        engine.step(config, network, batch, loss, optimizer)

    def floor():
        with engine.autocast(config):
            features = backbone(normal())
        network.backbone.zero_grad(set_to_none=True)
        features.backward(features.detach())

    return step, floor


def bap_case(batch=20, boxes=50, form=None):
    form = form or models.BAP()
    cells = CROP // 8 + 1
    features = torch.randn(batch, 1024, cells, cells, device=DEVICE, requires_grad=True)
    per_image = [random_boxes(boxes // batch + (i < boxes % batch), (CROP, CROP), i) for i in range(batch)]

    def run():
        foreground, queries = form(features, per_image, (CROP, CROP))[:2]
        (foreground.sum() + queries.sum()).backward()
        features.grad = None
    return run


def nal_case(form=losses.noise_aware_loss, labels=1 + CLASSES, batch=None):
    shape = (batch or BATCH, CROP, CROP)
    cosine = (2 * torch.rand(shape[0], labels, CROP, CROP, device=DEVICE) - 1).requires_grad_()
    y_crf, y_ret = labels_of(shape, labels)

    def run():
        form(cosine, y_crf, y_ret).backward()
        cosine.grad = None
    return run


def photograph(size=None, seed=0):
    """Smooth noise, (3, H, W) uint8: what a JPEG decoder and a CRF make of it is like a photograph's cost."""
    size = size or SIZE
    coarse = np.random.default_rng(seed).integers(0, 256, (size[0] // 6, size[1] // 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1).copy()


def sample(size=None, boxes=3, classes=2):
    size = size or SIZE
    boxes = random_boxes(boxes, size, 1) * 0.7
    return dict(id="x", image=torch.from_numpy(photograph(size)), boxes=boxes,
                labels=torch.arange(len(boxes)) % classes + 1, background=models.outside_boxes([boxes], size)[0].byte())


def read_settings(*arguments):
    config = settings.read("eval", ["data.shapes=false", *arguments])
    config.device = DEVICE
    return config


def label_maps_of(config, network, image, marginals):
    """Ycrf and Yret of one image, whatever the CRF says."""
    u = make_labels.unaries(config, network, image)
    y_crf = make_labels.label_by_crf(marginals, u)
    return y_crf, make_labels.label_by_prototypes(y_crf, u, network.classifier.weight.float())


def label_parts(size=None, folder=Path(".")):
    """-> (stage 2 of one image without the CRF, the network alone, all but the network, the CRF, the naive form of the
    label maps).
    """
    size = size or SIZE
    config, image = read_settings(), sample(size)
    network = models.BoxClassifier(CLASSES).eval().to(DEVICE, memory_format=torch.channels_last)
    tensor = image["image"][None].to(DEVICE, memory_format=torch.channels_last)
    u = make_labels.unaries(config, network, image)
    crf = image["image"].permute(1, 2, 0).numpy(), u.probabilities.cpu().numpy()
    marginals = dense_crf(*crf)
    outside = image["background"][0].to(DEVICE).float()

    def whole(network=network):
        for kind, y in zip(("Ycrf", "Yret"), label_maps_of(config, network, image, marginals)):
            datasets.write_mask(folder / kind / "x.png", y.byte().cpu().numpy())

    @torch.inference_mode()
    def forward():
        return network.features(tensor)

    features = forward()
    known = SimpleNamespace(features=lambda _: features, classifier=network.classifier)

    @torch.inference_mode()
    def upsampled_first():
        y_crf = torch.from_numpy(marginals.argmax(0)).to(DEVICE)
        naive.label_maps(forward()[0], network.classifier.weight, size, outside, [1, 2], y_crf)

    return whole, forward, partial(whole, known), partial(dense_crf, *crf), upsampled_first


def label_maps(side):
    """-> (the label maps of a square image from given features, the naive form of them)."""
    size, config = (side, side), read_settings()
    image, (h, w) = sample(size), (1 + s // 8 for s in models.padded_size(size))
    features = torch.rand(1, 1024, h, w, device=DEVICE).contiguous(memory_format=torch.channels_last)
    network = SimpleNamespace(features=lambda _: features, classifier=torch.nn.Linear(1024, 21, bias=False).to(DEVICE))
    outside = image["background"][0].to(DEVICE).float()
    marginals = np.random.default_rng(0).random((3, *size), np.float32)
    y_crf = torch.from_numpy(marginals.argmax(0)).to(DEVICE)

    def ours():
        label_maps_of(config, network, image, marginals)

    @torch.inference_mode()
    def upsampled_first():
        naive.label_maps(features[0], network.classifier.weight, size, outside, [1, 2], y_crf)

    return ours, upsampled_first


def evaluation_parts(folder=Path(".")):
    """-> (plain evaluation of one image, the network alone, the eight views, their networks alone)."""
    network = models.DeepLab(1 + CLASSES).eval().to(DEVICE, memory_format=torch.channels_last)
    image = torch.from_numpy(photograph())
    truth = labels_of((1, *SIZE), 1 + CLASSES)[0][0].byte().cpu().numpy()
    datasets.write_mask(folder / "truth.png", truth)
    views = [torch.rand(2, 3, *(round(k * side) for side in SIZE), device=DEVICE)
             .contiguous(memory_format=torch.channels_last) for k in (0.5, 0.75, 1, 1.5)]
    one = views[2][:1]

    def plain():
        labels = engine.predict(network, image.to(DEVICE), (1.0,), False).max(0).indices.byte().cpu().numpy()
        datasets.write_mask(folder / "x.png", labels)
        engine.confusion(datasets.read_mask(folder / "truth.png", 21), datasets.read_mask(folder / "x.png", 21), 21)

    @torch.inference_mode()
    def forwards(images):
        for x in images:
            network.features(x)

    return (plain, lambda: forwards([one]),
            lambda: engine.predict(network, image.to(DEVICE), [0.5, 0.75, 1.0, 1.5], True).cpu(),
            lambda: forwards(views))


MEMORY = {
    "stage 1 step": lambda: stage_1("fp32")[0], "stage 3 step": lambda: stage_3("fp32")[0],
    "stage 1 floor": lambda: stage_1("fp32")[1], "stage 3 floor": lambda: stage_3("fp32")[1],
    "labels": lambda: label_parts(folder=Path(tempfile.mkdtemp()))[0], "labels floor": lambda: label_parts()[1],
    "labels naive": lambda: label_parts()[4],
    "NAL": lambda: nal_case(batch=20), "NAL naive": lambda: nal_case(naive.noise_aware_loss, batch=20),
    "BAP": bap_case, "BAP naive": lambda: bap_case(form=naive.bap),
}


# ---------------------------------------------------------------- tables


def training():
    """-> seconds a crop, of each stage."""
    title(f"training step, VGG-16, {BATCH} crops of {CROP}", "s", "backbone alone, s", "ratio", "MB", "backbone, MB")
    rates = {}
    for stage, parts in (("stage 1", stage_1), ("stage 3", stage_3)):
        memory, steps = (peak(f"{stage} step"), peak(f"{stage} floor")), []
        for form in FORMS:
            step, floor = clock(*parts(form), rounds=10 if GPU else 4)
            row(f"{stage}, {form}", step, floor, step / floor, *(memory if form == "fp32" else ("", "")))
            steps.append(step)
        rates[stage] = min(steps) / BATCH
    return rates


def at_once(network, workers):
    """Seconds of the network and of worker processes beside it, which on a CPU have the same cores."""
    return max(network, workers) if GPU else network + workers


def recipes(names):
    """Memory is all that torch allocates on the GPU: weights, optimizer, activations."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as runs.py does, for the deterministic columns
    title("training step", "crops", "fp32, s", "bf16, s", "fp32, deterministic, s", "bf16, deterministic, s",
          "fp32, MB", "bf16, MB")
    for name in names:
        config = settings.read("eval", [str(ROOT / "configs" / f"{name}.yaml")])
        for stage, s in ((stage_1, config.train_cls), (stage_3, config.train_seg)):
            times, memory = [], []
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                torch.backends.cudnn.benchmark = not deterministic
                for form in FORMS[:2]:
                    step, _ = stage(form, s, len(config.data.classes))
                    times += clock(step, rounds=10 if GPU else 2)
                    if GPU and not deterministic:
                        torch.cuda.reset_peak_memory_stats()
                        step()
                        memory.append(f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}")
                    del step
            torch.use_deterministic_algorithms(False)
            row(f"{name}, {stage.__name__}, {s.backbone}", f"{s.batch} of {s.crop}", *times, *(memory or ("", "")))


def pooling_and_loss():
    title("part, forward and backward", "s", "naive, s", "gain", "MB", "naive, MB")
    ours, theirs = clock(bap_case(), bap_case(form=naive.bap))
    row("BAP, 20 x 1024 x 41 x 41, 50 boxes", ours, theirs, theirs / ours, peak("BAP"), peak("BAP naive"))
    ours, theirs = clock(nal_case(batch=20), nal_case(naive.noise_aware_loss, batch=20))
    row("NAL, 20 x 21 x 321 x 321", ours, theirs, theirs / ours, peak("NAL"), peak("NAL naive"))
    megabytes = 20 * 21 * CROP * CROP * 4 / 1e6
    print(f"\nThe cosines of that NAL are {megabytes:.0f} MB, their gradient as much.")


def depthwise(cells=(47, 63)):
    """Layers of EfficientNet-Lite0 at stride 8, as a CPU computes them in evaluation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    title("dilated depthwise convolution of a 375 x 500 image, one core", "s", "nn.Conv2d, s", "gain")
    for channels, kernel, dilation in ((672, 5, 2), (1152, 5, 4), (1152, 3, 4)):
        layer = models.DilatedGroups(channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation,
                                     groups=channels).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        x = torch.randn(1, channels, *cells).contiguous(memory_format=torch.channels_last)
        ours, theirs = clock(partial(layer, x), partial(nn.Conv2d.forward, layer, x), rounds=10)
        row(f"{channels} channels, kernel {kernel}, dilation {dilation}", ours, theirs, theirs / ours)
    torch.set_num_threads(threads)


def input_pipeline():
    """-> seconds a crop, of each stage, in one process."""
    rates, (height, width) = {}, SIZE
    title(f"crops of {CROP} from {height} x {width}, one core", "a second", "decoding alone, a second")
    with tempfile.TemporaryDirectory() as root:
        names = [f"{n}" for n in range(8)]
        for folder in ("JPEGImages", "Annotations", "ImageSets/Segmentation"):
            Path(root, folder).mkdir(parents=True)
        for n, name in enumerate(names):
            image = Image.fromarray(photograph(seed=n).transpose(1, 2, 0))
            image.save(Path(root, f"JPEGImages/{name}.jpg"), quality=90)
            datasets.write_mask(Path(root, f"Y/{name}.png"), labels_of((1, *SIZE), 2)[0][0].cpu().numpy())
            Path(root, f"Annotations/{name}.xml").write_text(
                f"<a><size><width>{width}</width><height>{height}</height></size><object><name>a</name><bndbox><xmin>50"
                f"</xmin><ymin>50</ymin><xmax>{0.6 * width}</xmax><ymax>{0.8 * height}</ymax></bndbox></object></a>")
        Path(root, "ImageSets/Segmentation/listed.txt").write_text("\n".join(names))
        transform = datasets.training_transform(CROP, (124, 116, 104))
        take = lambda data: [data[k % len(data)] for k in range(16)]  # noqa: E731
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for stage, masks in (("stage 1", {}), ("stage 3, two masks", dict(masks=["Y", "Y"], boxes=False))):
            data = datasets.Stream(datasets.VOCDataset(root, "listed", ["a"], transform, **masks), 16, 0)
            plain = datasets.VOCDataset(root, "listed", ["a"], **masks)
            crops, decoding = clock(partial(take, data), partial(take, plain))
            row(stage, 16 / crops, 16 / decoding)
            rates[stage.split(",")[0]] = crops / 16
        torch.set_num_threads(threads)
    return rates


def labelling(folder):
    title("labels of one 375 x 500 image, VGG-16", "s", "share of the network's forward", "MB")
    *parts, naive_form = label_parts(folder=folder)
    (whole, forward, besides, crf), (upsampled_first,) = clock(*parts), clock(naive_form, rounds=1)
    row("network forward", forward, 1.0, peak("labels floor"))
    row("network, label maps, files", whole, whole / forward, peak("labels"))
    row("all of it but the network", besides, besides / forward, "")
    row("the same maps with features upsampled first", upsampled_first - forward, (upsampled_first - forward) / forward,
        peak("labels naive"))
    row("dense CRF, 3 labels, one core", crf, crf / forward, "")
    return at_once(whole, crf / WORKERS)


def evaluating(folder):
    title("evaluation of one 375 x 500 image, VGG-16", "s", "network alone, s", "ratio")
    plain, forward, views, forwards = clock(*evaluation_parts(folder), rounds=3)
    row("plain, with file and score", plain, forward, plain / forward)
    row("eight views", views, forwards, views / forwards)
    image = photograph().transpose(1, 2, 0)
    title("CRF of one 375 x 500 image, one core", "s")
    for labels in (2, 4, 21):
        p = torch.rand(labels, *SIZE).softmax(0).numpy()
        row(f"{labels} labels", clock(partial(dense_crf, image, p, (4.0, 121.0, 5.0)), rounds=3)[0])
    return plain


def scaling():
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for name, form in (("this", models.BAP()), ("a loop over boxes", naive.bap)):
        times = [clock(bap_case(2, count, form), rounds=3)[0] for count in COUNTS]
        left.plot(COUNTS, times, "o-", label=name)
    left.set(xlabel="boxes in two crops", ylabel="s", title="BAP, forward and backward", xscale="log", yscale="log")
    for name, index, rounds in (("this", 0, 5), ("upsampled first", 1, 1)):
        times = [clock(label_maps(side)[index], rounds=rounds)[0] for side in SIDES]
        middle.plot(SIDES, times, "o-", label=name)
    middle.set(xlabel="side of the image, pixels", title="labels besides network and CRF", yscale="log")
    for name, form in (("this", losses.noise_aware_loss), ("gathered pixels", naive.noise_aware_loss)):
        times = [clock(nal_case(form, count, 2), rounds=3)[0] for count in LABELS]
        right.plot(LABELS, times, "o-", label=name)
    right.set(xlabel="labels", title="NAL of two crops of 321", xscale="log", yscale="log")
    for axes in (left, middle, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "speed.png", dpi=80)
    print(f"\n{ROOT / 'docs' / 'speed.png'}")


def machine():
    if GPU:
        return f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"


def main():
    print(f"{machine()}; torch {torch.__version__}")
    if sys.argv[1:] == ["plot"]:
        return scaling()
    if sys.argv[1:2] == ["recipes"]:
        return recipes(sys.argv[2:] or RECIPES)
    torch.backends.cudnn.benchmark = True  # as engine.train does
    steps = training()
    pooling_and_loss()
    if not GPU:
        depthwise()
    inputs = input_pipeline()
    torch.backends.cudnn.benchmark = False  # as in the other stages
    with tempfile.TemporaryDirectory() as folder:
        label, plain = labelling(Path(folder)), evaluating(Path(folder))
    title(f"the full VOC with VGG-16 at these rates, {WORKERS} workers", "hours")
    for stage, iterations in (("stage 1", 8000), ("stage 3", 23805)):
        hours = at_once(steps[stage], inputs[stage] / WORKERS) * iterations * 20 / 3600
        row(f"{stage}: {iterations:,} x 20 crops", hours)
    row("stage 2: 10,582 + 1,449 images", label * (10582 + 1449) / 3600)
    row("plain evaluation: 1,449 images", plain * 1449 / 3600)
    scaling()


if __name__ == "__main__":
    main()
