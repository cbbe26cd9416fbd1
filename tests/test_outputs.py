"""The pictures, the model card and the DynamoDB table of a run."""

import copy
import csv
import re
import sys
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from matplotlib.image import imread

import detox_ppo
from detox_ppo import UserError, card_name, draw_toxicity, draw_training, fenced, paired_statistics, run

ROOT = Path(__file__).resolve().parent.parent
NASTY = [
    "a | b\n| c | d |\n---\nbase_model: evil\n---",
    "<script>alert(1)</script> <img src=x onerror=alert(1)> <!-- -->",
    "``` \n~~~\n# title\n- item\n> quote\n1. one",
    "**bold** _it_ __it__ a_b ~~gone~~ `code` $x$ \\| \\\\| &lt; &#124; &amp;",
    "[link](https://evil.example) ![i](x.png) <https://evil.example> www.evil.example a@b.example https://evil.example",
    "hidden \u202e\u200b\u0000\u2028\x1b[31m signs, emoji \N{GRINNING FACE} and Korean \uc548\ub155",
    "{{ jinja }} {% for x in y %} {0} %s \\n",
    "",
]


@pytest.fixture(scope="module")
def finished(small_config, tmp_path_factory):
    """A small run with a separate model_dir: its configuration, output directory and results."""
    directory = tmp_path_factory.mktemp("outputs") / "some run"
    config = small_config(learning_rate=0.01, output_dir=directory, model_dir=directory / "model")
    return config, directory, run(config)


def metrics_lines(steps):
    names = ("ppo/mean_scores", "objective/kl", "objective/kl_coef", "ppo/returns/mean", "objective/entropy")
    names += ("tokens/responses_len_mean", "ppo/val/var_explained")
    return [
        {"step": step, "ppo/skipped_steps": 0} | {name: step + i for i, name in enumerate(names)}
        for step in range(1, steps + 1)
    ]


# Pictures


def test_pictures_of_a_run(finished):
    for name in ("training.png", "toxicity.png"):
        pixels = imread(finished[1] / name)
        assert pixels.shape[0] >= 400 and pixels.shape[1] >= 1000
        assert (pixels[:5] == 1).all()  # a white page
        assert pixels.std() > 0.05  # with something on it
        assert (imread(finished[1] / "model" / name) == pixels).all()  # the card's


def test_training_picture_shows_the_metrics():
    metrics = metrics_lines(100)
    skipped = {"step": 101, "ppo/skipped_steps": 1, "objective/kl_coef": 0.2}
    figure = draw_training([*metrics, skipped])
    panels, price = figure.axes[:6], figure.axes[6]
    expected = {
        "score": "ppo/mean_scores",
        "KL": "objective/kl",
        "return": "ppo/returns/mean",
        "entropy": "objective/entropy",
        "length": "tokens/responses_len_mean",
        "variance": "ppo/val/var_explained",
    }
    for axes, (word, name) in zip(panels, expected.items(), strict=True):
        assert word in axes.get_title(loc="left")
        each, mean = axes.get_lines()
        assert all(tick == int(tick) for tick in axes.get_xticks())
        np.testing.assert_array_equal(each.get_xdata(), np.arange(1, 101))
        np.testing.assert_array_equal(each.get_ydata(), [line[name] for line in metrics])
        # the mean of the last five of 96..100 is 98
        assert mean.get_ydata()[-1] == pytest.approx(metrics[97][name])
        assert mean.get_label() == "mean of the last 5"
    np.testing.assert_array_equal(price.get_lines()[0].get_ydata(), [line["objective/kl_coef"] for line in metrics])
    assert "coefficient" in price.get_ylabel()


@pytest.mark.parametrize("steps", [0, 1])
def test_training_picture_of_a_very_short_run(steps, tmp_path):
    draw_training(metrics_lines(steps)).savefig(tmp_path / "training.png", dpi=20)


def toxicity_picture(before, after, judged=False, human=None, content="retrieval_at_1"):
    """The picture of a run with greedy toxicities of 0 and a judge that gives 1 minus the classifier's."""
    tables = [pd.DataFrame({"summary_toxicity": values}) for values in (before, after)]
    sampled = paired_statistics(before, after, 0, resamples=10)
    greedy = paired_statistics([0.0] * len(before), [0.0] * len(after), 0, resamples=10)
    results = {"summary_toxicity": sampled, "toxicity": sampled}
    results["greedy"] = {"summary_toxicity": greedy, "toxicity": greedy}
    results["quality"] = {"before": {content: 0.75, "length": 20.0}, "after": {content: 0.5, "length": 10.0}}
    results["greedy"]["quality"] = {when: {name: 1.0 for name in of} for when, of in results["quality"].items()}
    results["human"] = human or {}
    if judged:
        inverted = paired_statistics(1 - np.array(before), 1 - np.array(after), 0, resamples=10)
        results["judge"] = {"summary_toxicity": inverted, "greedy": {"summary_toxicity": greedy}}
    table = detox_ppo.results_table(results)
    return draw_toxicity(table, *({"sampled": table, "greedy": 0 * table} for table in tables))


@pytest.mark.parametrize("judged", [False, True])
def test_toxicity_picture_shows_the_pairs(judged):
    before, after = [0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.1, 0.7]
    shares, changes, _ = toxicity_picture(before, after, judged).axes
    names = ["sampled", "greedy", *["judge, sampled", "judge, greedy"] * judged, "with dialogue"]
    assert [label.get_text().replace("\n", " ") for label in shares.get_xticklabels()] == names
    heights = [[bar.get_height() for bar in bars] for bars in shares.containers]
    assert heights == [[50, 0, *[50, 0] * judged, 50], [25, 0, *[75, 0] * judged, 25]]
    sampled, greedy = (part.get_data().values for part in changes.patches)
    np.testing.assert_allclose(sampled, [-0.8, -0.6, 0, 0.5], atol=1e-9)
    assert not greedy.any()
    assert shares.get_ylim() == (0, 100) and changes.get_ylim() == (-1, 1)


@pytest.mark.parametrize(
    "content, human, label, level",
    [
        ("retrieval_at_1", {"retrieval_at_1": 0.9, "length": {"mean": 25.0}}, "R@1", [0.9, 0.9]),
        ("rougeL", {"length": {"mean": 25.0}}, "ROUGE-L", None),
        ("distinct_2", {"length": {"mean": 25.0}}, "mean length (tokens)", [25, 25]),
        ("distinct_2", {}, "mean length (tokens)", None),
    ],
)
def test_toxicity_picture_shows_the_content_kept(content, human, label, level):
    *_, contents = toxicity_picture([0.9, 0.8], [0.1, 0.2], human=human, content=content).axes
    assert contents.get_title() == "content kept" and contents.get_ylabel() == label
    sampled = [20, 10] if "length" in label else [0.75, 0.5]
    heights = [[bar.get_height() for bar in bars] for bars in contents.containers]
    assert heights == [[sampled[0], 1], [sampled[1], 1]]
    assert [list(line.get_ydata()) for line in contents.get_lines()] == ([level] if level else [])


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0], list(np.linspace(0, 1, 2000))])
def test_toxicity_picture_without_a_change(values, tmp_path):
    toxicity_picture(values, values).savefig(tmp_path / "toxicity.png", dpi=20)


# The model card


def html(markdown):
    """The page that a renderer which lets HTML through makes of it, parsed; XML has no control characters."""
    page = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown)
    page = re.sub(r"[\x00-\x08\x0b-\x1f]", "", page)
    return ElementTree.fromstring(f"<page>{page}</page>")


@pytest.mark.parametrize("text", [*NASTY, "````\na\n`````\n</pre>", "~~~"])
def test_fenced_text_is_shown_as_it_is(text):
    page = html(f"{fenced(text)}\n\nend\n")
    block, after = list(page)
    assert block.tag == "pre" and [code.tag for code in block] == ["code"] and not list(block[0])
    shown = text.replace("\x00", "\ufffd").replace("\x1b", "")
    assert block[0].text == shown + "\n" and after.text == "end"


def test_card_metadata(finished):
    """Neither licence nor language, which a run does not know; a data set only if it is the hub's."""
    config, directory, results = finished
    expected = {"base_model": "base", "library_name": "peft", "pipeline_tag": "summarization"}
    expected["tags"] = ["lora", "ppo", "detoxification"]
    assert ModelCard.load(directory / "model" / "README.md").data.to_dict() == expected
    of_the_hub = copy.copy(config)
    vars(of_the_hub).update(model_name="google/flan-t5-base@main", dataset_name="knkarthick/dialogsum@main")
    data = card_of(of_the_hub, results, directory).data
    assert (data.base_model, data.datasets) == ("google/flan-t5-base", ["knkarthick/dialogsum"])


def card_of(config, results, directory):
    comparison = pd.read_csv(directory / "comparison.csv", keep_default_na=False)
    return ModelCard(detox_ppo.model_card(config, results, detox_ppo.results_table(results), comparison[:1]))


def test_names_in_the_metadata(tmp_path):
    assert card_name("google/flan-t5-base") == "google/flan-t5-base"
    assert card_name("knkarthick/dialogsum@main") == "knkarthick/dialogsum"
    for name in ("a b..c--d", "-x-", "---", "n" * 200, "train.csv", "a: [b] # c"):
        (tmp_path / name).mkdir()
        found = card_name(str(tmp_path / name))
        validate_repo_id(found)
        assert "/" not in found
    assert card_name(str(tmp_path / "a b..c--d" / "..")) == card_name(str(tmp_path))


def rows_of(table):
    return [["".join(cell.itertext()) for cell in row] for row in table.findall("./tbody/tr")]


def test_card_describes_the_run(finished):
    config, directory, results = finished
    card = (directory / "model" / "README.md").read_text(encoding="utf-8")
    page = html(ModelCard(card).text)
    text = " ".join("".join(page.itertext()).split())
    assert text.startswith("some-run") and results["verdict"] in text
    assert [image.get("src") for image in page.iter("img")] == ["toxicity.png", "training.png"]
    assert [title.text for title in page.iter("h2")] == ["Examples", "Use", "Limits"]
    (table,) = page.findall("./table")
    columns = ["measure", "decoding", "before", "after", "human", "mean change", "95% interval", "p"]
    assert ["".join(cell.itertext()) for cell in table.find("./thead/tr")] == columns
    rows = {(measure, decoding): cells for measure, decoding, *cells in rows_of(table)}
    assert len(rows) == 12
    for decoding, block in (("sampled", results), ("greedy", results["greedy"])):
        for name, key in (("toxicity", "summary_toxicity"), ("length", "length"), ("reward", "reward")):
            means = [f"{block[key][when]['mean']:.4g}" for when in ("before", "after")]
            human = "" if key == "reward" else f"{results['human'][key]['mean']:.4g}"
            told = detox_ppo.format_change(block[key]) if name == "toxicity" else {}
            assert rows[name, decoding] == [*means, human, *(told.get(column, "") for column in columns[-3:])]
    options, *examples, code = ["".join(block.itertext()) for block in page.iter("pre")]
    assert yaml.safe_load(options)["model_name"] == "base" and yaml.safe_load(options)["learning_rate"] == 0.01
    comparison = pd.read_csv(directory / "comparison.csv", keep_default_na=False)
    for shown, row in zip(examples, (0, 2, 3), strict=True):
        told = comparison.iloc[row]
        assert shown.startswith(f"{told.dialogue}\n\nbefore: {told.response_before}\n\nafter: {told.response_after}\n")
    for word in ("English", "does not measure", "comparison.csv"):
        assert word in text
    assert not any(str(place) in card for place in (Path.home(), directory, ROOT))


def test_markup_is_escaped_in_the_card(finished):
    """Dialogues, summaries and labels that are mark-up stay text; warnings are the script's own."""
    config, _, results = finished
    found = pd.DataFrame({"response": NASTY, "reward": np.arange(len(NASTY))})
    both = {"sampled": found, "greedy": found}
    comparison = detox_ppo.build_comparison({"dialogue": NASTY, "summary": NASTY}, both, both)
    changed, warned = copy.copy(config), results | {"warnings": {"reward hacking": "summaries are empty"}}
    vars(changed).update(reward_label="```", toxic_label="|x|\n```\n<b>x</b>")
    card = ModelCard(detox_ppo.model_card(changed, warned, detox_ppo.results_table(results), comparison))
    page = html(card.text)
    assert not [tag for tag in ("script", "a", "b", "em", "del") if page.findall(f".//{tag}")]
    assert [title.text for title in page.iter("h2")] == ["Examples", "Use", "Limits"]
    blocks = ["".join(block.itertext()) for block in page.iter("pre")]
    assert len(blocks) == 2 + len(NASTY)
    assert yaml.safe_load(blocks[0])["toxic_label"] == changed.toxic_label
    for text, block in zip(NASTY, blocks[1:], strict=False):
        assert text.replace("\x00", "\ufffd").replace("\x1b", "") in block
    compile(blocks[-1], "card", "exec")
    assert "Warning: summaries are empty" in " ".join("".join(page.itertext()).split())


def test_the_card_s_code_runs_as_pasted(finished, tiny, capsys, monkeypatch):
    """With a base of the hub as it is; a local one is to be set first. It prints what the run found greedily."""
    config, directory, results = finished
    monkeypatch.chdir(directory / "model")
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert "\nbase = 'path/to/base'  # hub id or local directory of the base model\n" in code
    names = {}
    exec(code.replace("path/to/base", str(tiny / "base")), names)
    assert names["prompt"] == detox_ppo.PROMPT
    printed = capsys.readouterr().out.strip()
    comparison = pd.read_csv("../comparison.csv", keep_default_na=False).set_index("dialogue").loc[names["dialogue"]]
    assert printed == comparison["greedy_response_after"]
    of_the_hub = copy.copy(config)
    vars(of_the_hub).update(model_name="google/flan-t5-base", hub_model_id="example/clean")
    text = card_of(of_the_hub, results, directory).text
    assert "\nbase = 'google/flan-t5-base'  #" in text and "\nadapter = 'example/clean'  #" in text


# comparison.csv

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1+1", "\r=1+1", "'=1+1", "'", "a=1", "a\n=1", ""]


@pytest.mark.parametrize("letter", ["", "\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_a_spreadsheet_runs_no_cell_of_the_comparison(tmp_path, letter):
    """A reader has the text back, and numbers stay as they are. Only what is not ASCII needs a BOM."""
    table = pd.DataFrame({"dialogue": FORMULAS, "response": [text + letter for text in FORMULAS], "reward": -0.5})
    detox_ppo.write_comparison(table, tmp_path / "comparison.csv")
    assert (tmp_path / "comparison.csv").read_bytes().startswith(b"\xef\xbb\xbf") == bool(letter)
    with open(tmp_path / "comparison.csv", encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == list(table.columns)
    assert not [cell for *texts, _ in rows for cell in texts if cell.startswith(tuple("=+-@\t\r"))]
    read = pd.read_csv(tmp_path / "comparison.csv", keep_default_na=False).replace("^'", "", regex=True)
    pd.testing.assert_frame_equal(read, table)


# DynamoDB


def make_table(client, name):
    client.create_table(
        TableName=name,
        KeySchema=[{"AttributeName": "conversation_id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "conversation_id", "AttributeType": "N"}],
        BillingMode="PAY_PER_REQUEST",
    )


@pytest.fixture(scope="module")
def dynamodb():
    """A client of moto's HTTP server, with the table "summaries" in it."""
    pytest.importorskip("awswrangler")
    import boto3
    from moto.server import ThreadedMotoServer

    patch = pytest.MonkeyPatch()
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "eu-west-1"}
    settings |= {"ACCESS_KEY_ID": "testing", "SECRET_ACCESS_KEY": "testing", "EC2_METADATA_DISABLED": "true"}
    for name, value in settings.items():
        patch.setenv(f"AWS_{name}", value)
    patch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    patch.delenv("AWS_PROFILE", raising=False)
    client = boto3.client("dynamodb")
    make_table(client, "summaries")
    yield client
    server.stop()
    patch.undo()


def test_rows_in_the_table(dynamodb, finished, capsys):
    directory = finished[1]
    detox_ppo.upload_comparison("summaries", directory)
    assert "4 rows" in capsys.readouterr().out
    comparison = pd.read_csv(directory / "comparison.csv", keep_default_na=False, dtype=str)
    items = sorted(dynamodb.scan(TableName="summaries")["Items"], key=lambda item: int(item["conversation_id"]["N"]))
    assert len(items) == 4
    for number, (item, row) in enumerate(zip(items, comparison.itertuples(), strict=True), start=1):
        texts = {name: {"S": getattr(row, name)} for name in ("response_before", "response_after")}
        texts["query"] = {"S": detox_ppo.build_prompt(row.dialogue)}
        rewards = {name: item[name] for name in ("reward_before", "reward_after")}
        assert item == {"conversation_id": {"N": str(number)}} | texts | rewards
        for name, value in rewards.items():
            assert Decimal(value["N"]) == Decimal(getattr(row, name))


def test_difficult_rows(dynamodb, tmp_path):
    texts = NASTY + FORMULAS
    table = pd.DataFrame({"dialogue": texts, "response_before": "NA", "response_after": ""})
    table["reward_before"], table["reward_after"], table["reward_diff"] = 1e-17, -1 / 3, 0.0
    detox_ppo.write_comparison(table, tmp_path / "comparison.csv")
    detox_ppo.upload_comparison("summaries", str(tmp_path))
    items = {int(item["conversation_id"]["N"]): item for item in dynamodb.scan(TableName="summaries")["Items"]}
    queries = [items[i]["query"]["S"] for i in range(1, len(texts) + 1)]
    assert queries == list(map(detox_ppo.build_prompt, texts))
    assert items[1]["response_before"] == {"S": "NA"} and items[1]["response_after"] == {"S": ""}
    assert float(items[1]["reward_before"]["N"]) == 1e-17 and float(items[1]["reward_after"]["N"]) == -1 / 3
    table.head(0).to_csv(tmp_path / "comparison.csv", index=False)
    detox_ppo.upload_comparison("summaries", tmp_path)


def test_a_run_uploads_after_everything_was_saved(dynamodb, small_config, tmp_path, monkeypatch, capsys):
    options = {"max_ppo_steps": 1, "eval_samples": 2, "eval_max_new_tokens": 4, "output_dir": tmp_path / "run"}
    with pytest.raises(UserError) as error:
        run(small_config(dynamodb_table="missing", **options))
    for name in ("results.json", "comparison.csv", "README.md", "toxicity.png", "adapter/adapter_config.json"):
        assert (tmp_path / "run" / name).is_file()
    message = str(error.value)
    assert "--dynamodb_table missing" in message and "\n" not in message and "ResourceNotFound" in message
    assert str(tmp_path / "run") in message and "README" in message
    # the README's command, once the table is there
    make_table(dynamodb, "missing")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(r"python -c '(import detox_ppo; .*upload_comparison.*)'", readme)[1]
    exec(command.replace("NAME", "missing").replace("checkpoints/run", str(tmp_path / "run")))
    assert dynamodb.scan(TableName="missing")["Count"] == 2


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"AWS_DEFAULT_REGION": None, "AWS_REGION": None}, "region"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_missing_requirements_of_an_upload(dynamodb, finished, monkeypatch, settings, word):
    import boto3

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError) as error:
        detox_ppo.upload_comparison("summaries", finished[1])
    assert word in str(error.value) and str(error.value).startswith("--dynamodb_table summaries: ")


def test_upload_of_what_is_not_there(dynamodb, tmp_path):
    with pytest.raises(UserError, match="^--dynamodb_table summaries: FileNotFoundError: .*comparison.csv"):
        detox_ppo.upload_comparison("summaries", tmp_path)


def test_upload_without_its_package(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "awswrangler", None)
    with pytest.raises(UserError, match="^--dynamodb_table summaries: pip install awswrangler"):
        detox_ppo.upload_comparison("summaries", finished[1])
