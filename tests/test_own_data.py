"""Own data files, evaluation without training, and own adapters, locally and on the hub."""

import functools
import gzip
import importlib.util
import json
import re
import shutil
import threading
import warnings
import zipfile
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hub_upload import UploadHub
from huggingface_hub import HfApi, ModelCard

import detox_ppo
from detox_ppo import DetoxConfig, UserError, load_dialogues, parse_config

pytestmark = pytest.mark.usefixtures("quick")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
ROWS = [
    {"id": "1", "dialogue": '#Person1#: "Hi", he said; well,\n#Person2#: hello.', "summary": "They; greet, twice."},
    {"id": "2", "dialogue": "#Person1#: NA\t#Person2#: 0012", "summary": "null"},
    {"id": "3", "dialogue": "#Person1#: naïve 😀", "summary": "1e3"},
]
EXPECTED = [
    {"row": i, "dialogue": row["dialogue"], "summary": row["summary"], "references": [row["summary"]]}
    for i, row in enumerate(ROWS)
]


def write(kind, directory):
    """Write ROWS in a format; returns the dataset_name."""
    table, path = pd.DataFrame(ROWS), directory / f"rows.{kind}"
    if kind in ("csv", "CSV", "csv.gz"):
        table.to_csv(path, index=False)
    elif kind == "tsv":
        table.to_csv(path, index=False, sep="\t")
    elif kind == "semicolon.csv":
        table.to_csv(path, index=False, sep=";")
    elif kind in ("jsonl", "jsonl.gz"):
        table.to_json(path, orient="records", lines=True)
    elif kind == "json":
        table.to_json(path, orient="records", force_ascii=False, indent=1)
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    elif kind == "parquet":
        table.to_parquet(path)
    elif kind == "datasets.parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "datasets.json":
        datasets.Dataset.from_list(ROWS).to_json(path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved with splits":
        parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        datasets.DatasetDict(parts).save_to_disk(path)
    return str(path)


KINDS = """csv CSV csv.gz tsv semicolon.csv jsonl jsonl.gz json json.gz parquet datasets.parquet datasets.json
    saved""".split()


@pytest.mark.parametrize("ending", ["csv.zip", "csv.bz2", "csv.xz", "jsonl.ZIP", "parquet"])
def test_compressed_tables_shards_and_a_directory_named_data(ending, tmp_path):
    (tmp_path / "data").mkdir()
    names = [f"train-0000{i}-of-00002.{ending}" for i in range(2)]
    for name, part in zip(names, (ROWS[:2], ROWS[2:]), strict=True):
        table = pd.DataFrame(part).astype({"summary": "category"})
        if ending == "parquet":
            table.to_parquet(tmp_path / "data" / name)
        elif ending == "jsonl.ZIP":
            table.to_json(tmp_path / "data" / name, orient="records", lines=True, compression="zip")
        else:
            table.to_csv(tmp_path / "data" / name, index=False)
    assert load_dialogues(str(tmp_path)).to_list() == EXPECTED
    assert load_dialogues(str(tmp_path / "data")).to_list() == EXPECTED
    (tmp_path / "data" / names[1]).unlink()
    with pytest.raises(UserError, match="split train has only 1 of its 2 files"):
        load_dialogues(str(tmp_path))


SPREADSHEETS = {
    "pipes": "id|dialogue|summary\n1|a, b|007\n2|c|NA\n",
    "separator in the first line": "sep=;\r\nid;dialogue;summary\n1;a, b;007\n2;c;NA\n",
    "spaces around names": 'id, dialogue ,summary \n1,"a, b",007\n2,c,NA\n',
    "blank rows": 'id,dialogue,summary\n,,\n1,"a, b",007\n , ,\n2,c,NA\n,,\n,,\n',
}


@pytest.mark.parametrize("content", SPREADSHEETS.values(), ids=SPREADSHEETS)
def test_csv_files_of_spreadsheets(content, tmp_path, capsys):
    (tmp_path / "a.csv").write_text(content)
    found = load_dialogues(str(tmp_path / "a.csv"))
    assert (found["dialogue"], found["summary"]) == (["a, b", "c"], ["007", "NA"])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("orient", ["columns", "split", "index", "table", "records", "data", "list"])
def test_json_in_each_orient(orient, indent, tmp_path):
    path, table = tmp_path / "a.json", pd.DataFrame(ROWS)
    if orient == "data":
        path.write_text(json.dumps({"data": ROWS}, indent=indent))
    elif orient == "list":
        path.write_text(json.dumps(table.to_dict("list"), indent=indent))
    else:
        table.to_json(path, orient=orient, indent=indent)
    assert load_dialogues(str(path)).to_list() == EXPECTED


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_table_named_txt(kind, tmp_path):
    name = write(kind, tmp_path)
    assert load_dialogues(shutil.copy(name, name + ".txt")).to_list() == EXPECTED


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_spaces_only_are_empty(kind, tmp_path, capsys):
    rows = [dict(ROWS[0]) for _ in range(20)]
    rows[4]["dialogue"], rows[11]["summary"] = " \t\n ", " \u00a0 "
    table = pd.DataFrame(rows)
    if kind == "jsonl":
        table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    else:
        getattr(table, f"to_{kind}")(tmp_path / f"a.{kind}", index=False)
    kept = load_dialogues(str(tmp_path / f"a.{kind}"))
    assert kept["row"] == [row for row in range(20) if row != 4] and kept["summary"][10] == ""
    assert "(rows 5 ...): left out" in capsys.readouterr().out


def test_json_of_one_row(tmp_path):
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=indent))
        assert load_dialogues(str(tmp_path / "a.json")).to_list() == EXPECTED[:1]


TURNS = {
    "texts": ["Ann: Hi.", "Bob: Bye."],
    "speakers": [{"speaker": "Ann", "text": "Hi."}, {"speaker": "Bob", "text": "Bye."}],
    "chat": [{"role": "Ann", "content": "Hi."}, {"role": "Bob", "content": "Bye."}],
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_a_dialogue_as_a_list_of_turns(turns, kind, tmp_path):
    write_table = datasets.Dataset.from_list([{"dialogue": turns, "summary": "They part."}] * 2)
    getattr(write_table, {"jsonl": "to_json", "parquet": "to_parquet"}[kind])(tmp_path / f"a.{kind}")
    assert load_dialogues(str(tmp_path / f"a.{kind}"))["dialogue"] == ["Ann: Hi.\nBob: Bye."] * 2


def test_xlsx(tmp_path):
    if importlib.util.find_spec("openpyxl"):
        pd.DataFrame(ROWS).to_excel(tmp_path / "a.xlsx", index=False)
        assert load_dialogues(str(tmp_path / "a.xlsx")).to_list() == EXPECTED
    else:
        with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
            archive.writestr("xl/workbook.xml", "")
        with pytest.raises(UserError, match="openpyxl"):
            load_dialogues(str(tmp_path / "a.xlsx"))


@pytest.mark.parametrize("kind", [*KINDS, "saved with splits"])
def test_each_form_gives_the_same_rows(kind, tmp_path):
    name = write(kind, tmp_path)
    assert load_dialogues(name).to_list() == EXPECTED
    if Path(name).is_dir():
        test = load_dialogues(name, split="test")
        assert (test and test.to_list()) == (EXPECTED[:1] if "splits" in kind else None)


def test_a_dataset_in_place_of_its_name(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *args, **kwargs: at_exit.append(functools.partial(*args, **kwargs)))
    config = DetoxConfig(dataset_name=datasets.Dataset.from_list(ROWS))
    assert load_dialogues(config.dataset_name).to_list() == EXPECTED
    at_exit[0]()
    assert not Path(config.dataset_name).exists()
    assert DetoxConfig(dataset_name=tmp_path).dataset_name == str(tmp_path)


def test_a_directory_with_a_file_for_each_split(tmp_path, capsys):
    for name, rows in (("train", ROWS), ("validation", ROWS[:2]), ("test", ROWS[:1])):
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    assert len(load_dialogues(str(tmp_path))) == 3
    assert capsys.readouterr().out == f"data: not used from {tmp_path}: validation.csv\n"
    assert len(load_dialogues(str(tmp_path), split="test")) == 1
    (tmp_path / "test.csv").unlink()
    assert load_dialogues(str(tmp_path), split="test") is None


def test_splits_of_other_names_are_named(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"training": rows, "dev": rows}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="no split train, found training, dev; save the one to train on with to_csv"):
        load_dialogues(str(tmp_path / "saved"))


def test_other_columns(tmp_path):
    table = pd.DataFrame(ROWS).rename(columns={"dialogue": "text", "summary": "tl;dr"})
    table.to_csv(tmp_path / "rows.csv", index=False)
    config = DetoxConfig(dialogue_column="text", summary_column="tl;dr")
    assert load_dialogues(str(tmp_path / "rows.csv"), config).to_list() == EXPECTED
    with pytest.raises(UserError, match="no column 'dialogue', found id, text, tl;dr. Set it with --dialogue_column"):
        load_dialogues(str(tmp_path / "rows.csv"))


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_unusable_rows_are_dropped_and_named(kind, empty, tmp_path, capsys):
    rows = [dict(ROWS[0]) for _ in range(20)]
    rows[4]["dialogue"], rows[11]["summary"] = empty, empty
    getattr(pd.DataFrame(rows), {"csv": "to_csv", "jsonl": "to_json", "parquet": "to_parquet"}[kind])(
        tmp_path / f"rows.{kind}", **({"orient": "records", "lines": True} if kind == "jsonl" else {})
    )
    kept = load_dialogues(str(tmp_path / f"rows.{kind}"), DetoxConfig(sft_steps=1))
    assert list(kept["row"]) == [row for row in range(20) if row != 4] and kept["summary"][10] == ""
    assert "1 of 20 rows have no dialogue (rows 5 ...): left out" in capsys.readouterr().out
    rows[0]["dialogue"], rows[12]["dialogue"] = None, None
    pd.DataFrame(rows).to_csv(tmp_path / "more.csv", index=False)
    with pytest.raises(UserError, match="more.csv: can't be loaded: 3 of 20 rows have no dialogue .*rows 1, 5, 13"):
        load_dialogues(str(tmp_path / "more.csv"))


def test_summaries_are_needed_only_for_sft(tmp_path, capsys):
    pd.DataFrame(ROWS).drop(columns="summary").to_csv(tmp_path / "rows.csv", index=False)
    assert set(load_dialogues(str(tmp_path / "rows.csv"))["summary"]) == {""}
    assert "no column 'summary', found id, dialogue: no human summaries" in capsys.readouterr().out
    needs_summaries = DetoxConfig(sft_steps=1)
    with pytest.raises(UserError, match="no column 'summary'.* --summary_column"):
        load_dialogues(str(tmp_path / "rows.csv"), needs_summaries)
    for which in ({"option_name": "eval_dataset_name"}, {"split": "test"}):  # rows to evaluate on need none
        assert set(load_dialogues(str(tmp_path / "rows.csv"), needs_summaries, **which)["summary"]) == {""}


def test_several_columns_of_summaries(tmp_path, capsys):
    """As DialogSum: one summary in the training file, three in the test file."""
    names = ["summary", "summary1", "summary2", "summary3"]
    config = DetoxConfig(summary_column=names, sft_steps=1)
    pd.DataFrame(ROWS).to_csv(tmp_path / "train.csv", index=False)
    test = pd.DataFrame({"dialogue": ["a", "b", "c"], "summary1": ["a1", "", ""], "summary2": ["a2", "b2", ""]})
    test.assign(summary3=["a3", "b3", ""]).to_csv(tmp_path / "test.csv", index=False)
    assert load_dialogues(str(tmp_path), config).to_list() == EXPECTED
    found = load_dialogues(str(tmp_path), config, split="test")
    assert found["references"] == [["a1", "a2", "a3"], ["b2", "b3"], []]
    assert found["summary"] == ["a1", "b2", ""]
    assert "no human summaries" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no column 'summary1', found id, dialogue, summary. Set it with --summary_c"):
        load_dialogues(str(tmp_path), DetoxConfig(summary_column=names[1:], sft_steps=1))


def test_rouge_is_the_best_of_several_summaries(ran, dialogues, tmp_path):
    table = pd.read_csv(dialogues / "train.csv")[["dialogue", "summary"]]
    table.to_csv(tmp_path / "train.csv", index=False)
    test = table.iloc[:4].rename(columns={"summary": "summary1"})
    test.assign(summary2=["", "xyz", "xyz", "xyz"]).to_csv(tmp_path / "test.csv", index=False)
    options = {"max_ppo_steps": 0, "eval_dataset_name": tmp_path / "test.csv"}
    (tmp_path / "options.yaml").write_text("summary_column: [summary, summary2, summary1]\n")
    best, _, comparison = ran(config=tmp_path / "options.yaml", **options)
    first, _, one = ran(summary_column="summary1", **options)
    assert best["rouge"] == first["rouge"] and best["rouge"]["before"]["rouge1"] > 0
    assert list(comparison.columns) == list(one.columns)
    of_first = {"xyz": 3, one["human_summary"][one["dialogue"] == test["dialogue"][0]].item(): 1}
    assert comparison["human_summary"].value_counts().to_dict() == of_first


def test_a_column_of_summaries_that_is_nowhere(ran, dialogues, tmp_path, capsys):
    """One that is named has to be in one of the tables; in the table to train on only if something learns from it."""
    (tmp_path / "a.txt").write_text("#Person1#: Hi. #Person2#: Bye.")
    names = {"summary_column": "tldr", "dataset_name": dialogues, "eval_dataset_name": tmp_path / "a.txt"}
    with pytest.raises(SystemExit):
        ran(max_ppo_steps=1, **names)
    assert "--summary_column tldr: no row has a summary there" in capsys.readouterr().err


def test_prompt(small_config, small, tmp_path):
    pd.DataFrame(ROWS[:1] * 8).to_csv(tmp_path / "rows.csv", index=False)
    config = small_config(
        prompt="Tell {dialogue} {shortly}.", input_min_text_length=1, eval_samples=1, batch_size=2, mini_batch_size=1
    )
    with warnings.catch_warnings(action="error", category=UserWarning):  # such as an object that can't be pickled
        splits = detox_ppo.build_dataset(load_dialogues(str(tmp_path / "rows.csv")), small.tokenizer, config)
    assert splits["train"]["query"][0] == f"Tell {ROWS[0]['dialogue']} {{shortly}}."
    for prompt in ("Summarize.", "{dialogue} {dialogue}"):
        with pytest.raises(UserError, match="--prompt .* should contain {dialogue} once"):
            DetoxConfig(prompt=prompt)


# Evaluation


@pytest.fixture
def ran(small_arguments, tmp_path, capsys):
    """Runs the command and returns results.json, stdout and the comparison."""

    def command(**options):
        output = tmp_path / "out"
        detox_ppo.main(small_arguments(**{"output_dir": output} | options))
        results = json.loads((output / "results.json").read_text())
        return results, capsys.readouterr().out, pd.read_csv(output / "comparison.csv", keep_default_na=False)

    return command


def test_the_directory_s_test_file_is_evaluated(ran, dialogues, tmp_path):
    table = pd.read_csv(dialogues / "train.csv")
    (tmp_path / "data").mkdir()
    table.iloc[:20].to_csv(tmp_path / "data" / "train.csv", index=False)
    table.iloc[20:23].to_csv(tmp_path / "data" / "test.csv", index=False)
    results, printed, comparison = ran(dataset_name=tmp_path / "data", max_ppo_steps=1)
    assert sorted(comparison["dialogue"]) == sorted(table["dialogue"][20:23])
    assert "data: 3 rows to evaluate on" in printed and "data: 20 rows, 20 with" in printed


def test_dialogues_that_are_trained_on_and_evaluated_are_counted(ran, dialogues, tmp_path):
    assert detox_ppo.overlap(["a", "b"], ["b", "c", "c", "b"]) == {"n": 4, "also_trained": 2, "duplicates": 2}
    table = pd.read_csv(dialogues / "train.csv")
    path = tmp_path / "rows.csv"
    pd.concat([table.iloc[:2], table.iloc[:1]]).to_csv(path, index=False)
    table.iloc[:24].to_csv(tmp_path / "train.csv", index=False)
    names = {"dataset_name": tmp_path / "train.csv", "eval_dataset_name": path}
    results, printed, _ = ran(max_ppo_steps=1, **names)
    assert results["overlap"] == {"n": 3, "also_trained": 3, "duplicates": 1}
    assert "3 of the 3 evaluated dialogues are also trained on" in results["warnings"]["overlap"]
    assert "1 of the 3 evaluated dialogues" in results["warnings"]["duplicates"]
    assert list(detox_ppo.Checkpoints(tmp_path / "out", 1).load()["state"].warnings)[:2] == ["overlap", "duplicates"]
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (card, printed):
        assert "3 of the 3 evaluated dialogues are also trained on" in text
    assert "held-out" not in card


@pytest.mark.parametrize("kind", ["csv", "test.csv in a directory"])
def test_rows_of_an_evaluation_file_are_not_filtered_by_length(ran, dialogues, tmp_path, kind):
    rows = pd.DataFrame({"dialogue": ["#Person1#: Hi. #Person2#: Bye."], "summary": ["They part."]})
    path = tmp_path / "rows.csv" if kind == "csv" else tmp_path / "data"
    path.mkdir() if kind != "csv" else None
    rows.to_csv(path if kind == "csv" else path / "test.csv", index=False)
    results, _, comparison = ran(eval_dataset_name=path, max_ppo_steps=1, dataset_name=dialogues)
    assert comparison["dialogue"].tolist() == rows["dialogue"].tolist()
    assert results["summary_toxicity"]["before"]["n"] == 1


def test_evaluation_without_training_compares_base_and_adapter(ran, small, dialogues, tmp_path):
    """On 25 rows without summaries and without training rows."""
    table = pd.read_csv(dialogues / "train.csv").iloc[:25].drop(columns="summary")
    table.to_csv(tmp_path / "rows.csv", index=False)
    results, printed, comparison = ran(
        dataset_name="nowhere", eval_dataset_name=tmp_path / "rows.csv", max_ppo_steps=0, eval_samples=-1
    )
    assert results["summary_toxicity"]["before"]["n"] == 25
    assert "empty" in results["quality"]["before"] and "kl" not in results["quality"]["before"]  # of no reference
    with small.policy.model.disable_adapter():
        base = detox_ppo.generate(
            small.policy,
            [small.tokenizer(detox_ppo.build_prompt(text)).input_ids for text in comparison["dialogue"]],
            None,
            (8, 8),
        )
    assert comparison["greedy_response_before"].tolist() == detox_ppo.plain_texts(small.tokenizer, base)
    assert (comparison["response_before"] != comparison["response_after"]).any()
    assert not results["rouge"]["after"] and not results["human"] and "of the human summaries" not in printed
    left = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert left == {"results.json", "comparison.csv", "toxicity.png"}


def test_one_dialogue_is_printed_in_full(ran, dialogues, tmp_path):
    text = pd.read_csv(dialogues / "train.csv")["dialogue"][0]
    (tmp_path / "one.txt").write_text(text + "\n")
    results, printed, comparison = ran(eval_dataset_name=tmp_path / "one.txt", max_ppo_steps=0, eval_max_new_tokens=40)
    printed = " ".join(printed.split())
    for column in ("response_before", "response_after", "greedy_response_before", "greedy_response_after"):
        toxicity = comparison[column.replace("response", "summary_toxicity")][0]
        assert f"(toxicity {toxicity:.4f}): {' '.join(comparison[column][0].split())}" in printed
    assert comparison["dialogue"].tolist() == [text]


@pytest.mark.parametrize("resume", ["false", "true"])
@pytest.mark.parametrize("model_dir", ["out", "elsewhere"])
def test_a_run_s_results_are_not_overwritten_by_its_evaluation(ran, tmp_path, capsys, model_dir, resume):
    ran(max_ppo_steps=1, model_dir=tmp_path / model_dir)
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit) as stop:
        ran(max_ppo_steps=0, adapter_name=tmp_path / model_dir, resume=resume)
    assert stop.value.code == 2 and (tmp_path / "out" / "results.json").read_bytes() == before
    told = f"--output_dir {tmp_path / 'out'}: it holds the results of a training run; choose another directory"
    assert told in capsys.readouterr().err


# Names


@pytest.mark.parametrize(
    "options, why",
    [({"hub_model_id": "clean"}, "OWNER/NAME"), ({"hub_model_id": "me/it", "max_ppo_steps": 0}, "nothing is trained")],
)
def test_settings_that_cannot_be_published_are_an_error_at_once(small_config, options, why, monkeypatch, tmp_path):
    monkeypatch.setattr(detox_ppo, "load_policy", lambda *_: pytest.fail("it loads first"))
    with pytest.raises(UserError, match=f"^--hub_model_id {options['hub_model_id']}: .*{why}"):
        detox_ppo.run(small_config(output_dir=tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


def test_a_model_s_contents_are_the_files_next_to_its_config(tiny, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "model")
    before = detox_ppo.contents_of(str(tmp_path / "model"), "model_name")
    for later in (".cache/huggingface/download/config.json.metadata", "run/results.json"):
        (tmp_path / "model" / later).parent.mkdir(parents=True)
        (tmp_path / "model" / later).write_text("of a download, of a run")
    assert detox_ppo.contents_of(str(tmp_path / "model"), "model_name") == before
    (tmp_path / "model" / "config.json").write_text("{}")
    assert detox_ppo.contents_of(str(tmp_path / "model"), "model_name") != before


def test_a_run_s_directory_stands_for_its_adapter(small_config, tiny, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tiny / "adapter")
    assert small_config(adapter_name=tmp_path / "run").adapter_name == str(tmp_path / "run" / "adapter")
    assert small_config(adapter_name=tiny / "adapter").adapter_name == str(tiny / "adapter")
    monkeypatch.chdir(tmp_path / "run")
    assert small_config(adapter_name="").adapter_name is None  # despite the adapter in this directory


@pytest.mark.parametrize(
    "given, meant",
    [
        ("--max_steps", "--max_ppo_steps"),
        ("--kl_coef=0.1", "--init_kl_coef"),
        ("--learning_rat", "--learning_rate"),
        ("config.yaml", "--config config.yaml"),
        ("--no_resume", "--resume false"),
        ("--no-freeze-encoder", "--freeze_encoder false"),
    ],
)
def test_the_closest_option_is_suggested(given, meant):
    with pytest.raises(UserError, match=re.escape(f"unknown option: {given} (did you mean {meant}?)")):
        parse_config([given])


@pytest.mark.parametrize("name", ["./models/t5", "/models/t5", "a/b/c", "dialogues.csv", "~/adapter", "data.jsonl.gz"])
def test_paths_are_not_looked_up_on_the_hub(name):
    with pytest.raises(
        UserError, match=re.escape(f"--dataset_name {name}: no such file or directory (relative paths start")
    ):
        detox_ppo.contents_of(name, "dataset_name")


# Publishing


def test_published(ran, monkeypatch, dialogues, tmp_path):
    """To a hub that keeps the uploaded files."""
    monkeypatch.setattr(detox_ppo.huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with UploadHub() as hub:
        monkeypatch.setattr(detox_ppo.huggingface_hub.constants, "ENDPOINT", hub.url)
        api = HfApi(endpoint=hub.url, token="hf_" + "a" * 30)
        monkeypatch.setattr(detox_ppo, "HfApi", lambda: api)
        other = tmp_path / "out" / "sft_adapter"  # of another run
        other.mkdir(parents=True)
        (other / "adapter_config.json").write_text("{}")
        _, printed, _ = ran(hub_model_id="example/clean", dataset_name=dialogues, max_ppo_steps=1)
    assert f"adapter and card are at {hub.url}/example/clean" in printed
    expected = {f"{place}{file}" for place in ("", "start_adapter/") for file in ADAPTER_FILES}
    assert set(hub.files["example/clean"]) >= expected | {"README.md", "training.png", "toxicity.png"}
    assert not [name for name in hub.files["example/clean"] if name.endswith((".pt", ".csv", ".json~"))]
    assert not [name for name in hub.files["example/clean"] if name.startswith("sft_adapter")]
    for name, content in hub.files["example/clean"].items():  # PEFT looks for an adapter at the root
        at_root = name in (*ADAPTER_FILES, "value_head.safetensors")
        assert content == (tmp_path / "out" / ("adapter" if at_root else "") / name).read_bytes()
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert "\n# example/clean: " in card.text and "\nadapter = 'example/clean'  #" in card.text
    assert str(tmp_path) not in card.content


def test_a_failed_upload_loses_nothing_and_prints_how_to_retry(ran, monkeypatch, dialogues, tmp_path):
    api = HfApi(endpoint="http://127.0.0.1:9", token="hf_" + "a" * 30)
    monkeypatch.setattr(detox_ppo, "HfApi", lambda: api)
    with pytest.raises(SystemExit) as stop:
        ran(hub_model_id="example/clean", dataset_name=dialogues, max_ppo_steps=1)
    assert stop.value.code == 2
    for name in ("results.json", "README.md", "comparison.csv", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / name).is_file()
    with pytest.raises(
        UserError, match=r"--hub_model_id: .*All files are saved; to retry: hf upload example/clean .*/out"
    ):
        detox_ppo.publish(DetoxConfig(hub_model_id="example/clean"), tmp_path / "out")


def test_main_in_a_thread(small_arguments, dialogues, tmp_path):
    """As in a notebook cell that runs in the background; signals go to the main thread."""
    arguments = small_arguments(dataset_name=dialogues, output_dir=tmp_path / "run", max_ppo_steps=0)
    thread = threading.Thread(target=detox_ppo.main, args=(arguments,))
    thread.start()
    thread.join()
    assert (tmp_path / "run" / "results.json").is_file()
