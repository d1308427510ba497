"""Settings: defaults, then a file, then the command line; what is refused."""
import dataclasses
import re

import pytest
from conftest import script

import settings
from settings import UsageError


def read(*arguments):
    return settings.read("train_cls", list(arguments))


def test_defaults_then_file_then_command_line(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("train_cls: {lr: 2e-3, batch: 7}\n")
    config = read(str(file), "train_cls.batch=9", "run.name=other")
    assert (config.train_cls.lr, config.train_cls.batch, config.train_cls.iterations) == (2e-3, 9, 8000)
    assert str(config.path) == "runs/other"


def test_the_recipe_of_the_paper_and_of_the_authors():
    """Sections 4.1 and 3.3; the CRF's numbers and the cut of u0 are their code's."""
    config = read(str(settings.DEFAULT_CONFIG.with_name("voc_vgg16.yaml")))
    one, two, three = config.train_cls, config.make_labels, config.train_seg
    assert (one.iterations, one.drop_at, one.batch, one.crop, one.lr) == (8000, 5000, 20, 321, 1e-3)
    assert (one.grid, one.bins, one.min_background) == (4, 2, 0.125)
    assert (two.u0, two.threshold, two.softmax, two.cam_norm, two.unary) == (True, 0.99, True, "box", "attention")
    assert (two.crf_bilateral, two.crf_gaussian, two.crf_iterations) == ((4, 55, 3), (3, 3), 10)
    assert (three.iterations, three.batch, three.crop, three.lr, three.poly) == (23805, 20, 321, 1e-3, 0.9)
    assert (three.gamma, three.weight, three.temperature) == (7, 0.1, 20)
    for s in (one, three):
        assert (s.optimizer, s.momentum, s.decay, s.scale, s.new_lr, s.double_bias) == (
            "sgd", 0.9, 5e-4, (0.5, 1.5), 10, True)
        assert (s.backbone, s.width, s.dropout, s.jitter, s.warmup, s.balance) == ("vgg16", 1, 0.5, 0.5, 0, False)
    assert (one.pooling, three.loss, three.drop_at) == ("bap", "nal", 0)
    crf = config.eval.crf_bilateral, config.eval.crf_gaussian, config.eval.crf_iterations
    assert crf == ((4, 121, 5), (3, 3), 10)


def test_the_recipe_of_deeplab_v2():
    """The authors' second segmenter: 20,000 x 10 crops, the head at ten times the rate, a CRF of its own."""
    folder = settings.DEFAULT_CONFIG.parent
    config, vgg16 = (read(str(folder / f"voc_{name}.yaml")) for name in ("resnet101", "vgg16"))
    s = config.train_seg
    assert config.train_cls == vgg16.train_cls and config.make_labels == vgg16.make_labels
    assert config.data == vgg16.data
    assert (s.backbone, s.weights, s.iterations, s.batch, s.crop) == ("resnet101", "imagenet", 20000, 10, 321)
    assert (s.lr, s.poly, s.drop_at, s.new_lr, s.double_bias) == (2.5e-4, 0.9, 0, 10, False)
    assert (s.optimizer, s.momentum, s.decay, s.scale, s.jitter) == ("sgd", 0.9, 5e-4, (0.5, 1.5), 0.5)
    crf = config.eval.crf_bilateral, config.eval.crf_gaussian, config.eval.crf_iterations
    assert crf == ((4, 67, 3), (3, 1), 10)


def test_a_bare_key_is_the_scripts_own_or_of_run():
    config = read("pooling=gap", "name=mine")
    assert (config.train_cls.pooling, config.run.name) == ("gap", "mine")


def test_a_folder_with_a_slash_behind_it_is_the_same():
    assert settings.read("eval", ["data.root=data/shapes/"]) == settings.read("eval", ["data.root=data/shapes"])


def test_a_folder_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "mine.yaml").write_text("data: {root: ~/VOC2007}\n")
    assert settings.read("eval", [str(tmp_path / "mine.yaml")]).data.root == "/home/me/VOC2007"


def test_labels_may_be_made_without_the_crf():
    assert read("make_labels.crf_iterations=0").make_labels.crf_iterations == 0
    with pytest.raises(UsageError, match="eval.crf_iterations is 0; set eval.crf=false"):
        read("eval.crf=true", "eval.crf_iterations=0")


def test_values_that_look_like_numbers_stay_text():
    assert read("run.name=7").run.name == "7"


@pytest.mark.parametrize("argument, words", [
    ("train_cls.poolng=gap", "unknown setting train_cls.poolng; did you mean pooling?"),
    ("train_csl.pooling=gap", "unknown section train_csl; did you mean train_cls?"),
    ("poling=gap", "unknown setting train_cls.poling; did you mean pooling?"),
    ("workrs=0", "unknown setting run.workrs; did you mean workers?"),
    ("pooling=max", "train_cls.pooling is 'max', not one of bap, gap"),
    ("masks=masked", "masks; did you mean data.masks?"),
    ("flip=true", "unknown setting train_cls.flip; did you mean eval.flip?"),
    ("eval.scale=1", "unknown setting eval.scale; did you mean scales?"),
    ("make_labels.split=val", "unknown setting make_labels.split; did you mean splits?"),
    ("eval.iterations=3", "eval.iterations; did you mean train_cls.iterations or train_seg.iterations?"),
    ("batch=many", "train_cls.batch is 'many', not an integer"),
    ("batch=1.5", "train_cls.batch is 1.5, not an integer"),
    ("balance=2", "train_cls.balance is 2, not true or false"),
    ("lr=fast", "train_cls.lr is 'fast', not a number"),
    ("scale=1", "train_cls.scale is 1, not a list of 2 numbers"),
    ("eval.scales=1", "eval.scales is 1, not a list of numbers"),
    ("data.classes=cat", "data.classes is 'cat', not a list of names"),
    ("balance=!!bool x", "train_cls.balance is '!!bool x', not true or false"),
    ("run.name=../x", "run.name is '../x'"),
    ("momentum=-1", "train_cls.momentum is -1.0, not at least 0"),
    ("poly=-1", "train_cls.poly is -1.0, not at least 0"),
    ("train_seg.new_lr=-1", "train_seg.new_lr is -1.0, not at least 0"),
    ("decay=-1", "train_cls.decay is -1.0, not at least 0"),
    ("train_cls.scale=[1]", "train_cls.scale is [1], not a list of 2 numbers"),
    ("scale=[0, 1]", "train_cls.scale is (0.0, 1.0), not at least 0.01"),
    ("scale=[2, 1]", "train_cls.scale is (2.0, 1.0), not low, high"),
    ("train_seg.dropout=1", "train_seg.dropout is 1.0, not a share under 1"),
    ("dropout=-0.1", "train_cls.dropout is -0.1, not a share under 1"),
    ("eval.scales=[]", "eval.scales is (), not at least 0.01"),
    ("eval.crf_bilateral=[4, 1e-8, 3]", "not at least 0.1"),
    ("lr=.nan", "train_cls.lr is nan, not a number"),
])
def test_bad_arguments(argument, words):
    with pytest.raises(UsageError) as error:
        read(argument)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("train_cls: {lrr: 1}", "unknown setting train_cls.lrr; did you mean lr?"),
    ("trian_cls: {lr: 1}", "unknown section trian_cls; did you mean train_cls?"),
    ("train_cls: 3", "section train_cls is 3"),
    ("[1, 2]", "not sections"),
    ("a: [", "not YAML"),
    ("run: {name: !!timestamp x}", "not YAML: "),
    ("run: {overwrite: !!bool x}", "not YAML: "),
    ("run: {seed: !!int ''}", "not YAML: "),
    ("train_seg: {loss: ce}", "train_seg.loss is 'ce', not one of nal, crf, ret, agree, entropy, bootstrap"),
])
def test_bad_files(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        read(str(file))
    assert words in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["nowhere.yaml", str(settings.DEFAULT_CONFIG.parent)])
def test_no_such_settings_file(path):
    with pytest.raises(UsageError, match=f"{path}: no such file"):
        read(path)


@pytest.mark.parametrize("path", sorted(settings.DEFAULT_CONFIG.parent.glob("*.yaml")), ids=lambda path: path.name)
def test_every_settings_file_is_valid(path):
    read(str(path))


COMMENTS = {"train_cls": "# gap: average pooling", "make_labels": "# images of each list whose u0 and u_c are kept",
            "train_seg": "# lambda: of the loss where Ycrf and Yret differ",
            "eval": "# score this folder's ID.png, not a segmenter"}


@pytest.mark.parametrize("name", [*COMMENTS, "pictures"])
def test_help_begins_with_the_command(name, tmp_path):
    assert script(name, "--help", cwd=tmp_path).stdout.startswith(f"python {name}.py [CONFIG.yaml] [key=value ...]\n")


@pytest.mark.parametrize("stage", COMMENTS)
def test_help_names_every_setting_once_with_its_default_and_comment(stage, tmp_path):
    done = script(stage, "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    _, *sections = done.stdout.split("\n\n")
    for text, name in zip(sections, (stage, "data", "run"), strict=True):
        title, *lines = text.splitlines()
        kind = settings.SECTIONS[name]
        assert title == name
        found = [re.match(r"    (\w+): ", line) for line in lines]
        names = [match[1] for match in found if match]
        fields = dataclasses.fields(kind)
        assert sorted(names) == sorted(field.name for field in fields)
        for field in fields:
            line = next(m.string for m in found if m and m[1] == field.name)
            if line.endswith(","):  # a long type, in two lines
                continue
            default = line.split(" = ")[1].split("  #")[0]
            expected = field.default
            if field.name != "classes":
                assert eval(default) == expected
    assert COMMENTS[stage] in sections[0] and "# processes that read images; as many run the CRF" in sections[2]
    assert "    # A list is named by its path under ImageSets, such as Main/trainval; a\n" in sections[1]


@pytest.mark.parametrize("argument", ["-v", "--seed", "--train_cls.lr=1"])
def test_options_are_told_how_settings_are_given(argument):
    with pytest.raises(UsageError, match=f"{argument}: settings are given as key=value; --help lists them"):
        read(argument)


