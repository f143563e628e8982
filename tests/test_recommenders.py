"Every recommender keeps to one interface; losses and recommenders of others are found by name."

import os
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
import torch

import widedeep_nb
from widedeep_nb.lib import content_features, recommender
from widedeep_nb.lib.core import UserError, to_index
from widedeep_nb.lib.recommender import (
    LOSSES,
    RECOMMENDERS,
    TASKS,
    Recommender,
    make_loss,
    recommender_class,
    register,
    register_loss,
)
from widedeep_nb.lib.recommender_checks import check_recommender, small_split

NAMES = list(RECOMMENDERS)
QUICK = {
    "epochs": 1,
    "n_iter": 2,
    "time_budget_min": 0.05,
    "clip": True,
}  # clip: the original is not by default


def quick_params(name):
    "Return hyperparameters that make a fit short."
    known = {f.name for f in fields(recommender_class(name))}
    return {k: v for k, v in QUICK.items() if k in known}


@pytest.fixture(scope="module")
def split():
    "Make a small split whose item table also has the items without interactions."
    small = small_split()
    return content_features.add_catalog(small, small.items)


@pytest.mark.parametrize("name", NAMES)
def test_interface(name, split):
    model = check_recommender(name, split, **quick_params(name))
    assert model.name == name


@pytest.mark.parametrize("name", NAMES)
def test_attributes_say_what_is_true(name):
    cls = recommender_class(name)
    known = {f.name for f in fields(cls)}
    assert cls.tasks and set(cls.tasks) <= set(TASKS)
    for task, space in (cls.search_space or {}).items():
        assert task in cls.tasks and set(space) <= known
    assert cls.max_epochs == 0 or "epochs" in known


# --- what the check finds


@dataclass
class Constant(Recommender):
    "Score every item by its number of interactions; a correct model that the wrong ones below start from."

    def _fit(self, split):
        codes = to_index(split.train["item"])
        self.count = torch.bincount(codes, minlength=split.n_train_items + 1).float()

    def _scores(self, users, history, items):
        return self.count[items.clamp(max=self.n_items)].expand(len(users), -1)


class ReadsTheTestPart(Constant):
    def fit(self, split):
        super().fit(split)
        ratings = float(split.test["rating"][:5].sum())
        self.count = self.count + ratings * torch.arange(len(self.count))
        return self


class IgnoresTheSeed(Constant):
    def _fit(self, split):
        super()._fit(split)
        self.count = self.count + torch.rand(
            len(self.count), generator=torch.Generator().manual_seed(torch.seed() % 1000)
        )


class ForgetsWhatItLearned(Constant):
    def _state(self):
        return {"count": torch.ones_like(self.count)}


class LeavesColdUsersOut(Constant):
    def _scores(self, users, history, items):
        scores = super()._scores(users, history, items).clone()
        scores[users >= self.n_users] = torch.nan
        return scores


class ScoresDependOnTheCandidates(Constant):
    def _scores(self, users, history, items):
        scores = super()._scores(users, history, items)
        return scores / scores.sum(1, keepdim=True)


class PredictsOutOfRange(Constant):
    predicts_ratings = True
    tasks = ("rating",)

    def predict(self, users, items, history=None):
        return torch.full((len(users),), 9.0)


class KnowsNoOtherItems(Constant):
    def _scores(self, users, history, items):
        return self.count[: self.n_items][items].expand(len(users), -1)


class HasNoSuchParameter(Constant):
    search_space = {"ranking": {"factors": (2, 8, "int")}}


WRONG = {
    ReadsTheTestPart: "no leak",
    IgnoresTheSeed: "two fits must give the same scores",
    ForgetsWhatItLearned: "a loaded model must give",
    LeavesColdUsersOut: "finite",
    ScoresDependOnTheCandidates: "which other items",
    PredictsOutOfRange: "in range",
    HasNoSuchParameter: "factors",
    KnowsNoOtherItems: "n_items or more",
}


@pytest.mark.parametrize("cls", [Constant, *WRONG], ids=lambda c: c.__name__)
def test_the_check_finds_what_is_wrong(cls, monkeypatch):
    monkeypatch.setitem(RECOMMENDERS, "tried", None)
    register("tried")(cls)
    if cls is Constant:
        check_recommender("tried")
        return
    with pytest.raises(UserError, match=WRONG[cls]):
        check_recommender("tried")


# --- names


def test_losses_are_registered_with_their_kind(monkeypatch):
    monkeypatch.setattr(recommender, "LOSSES", dict(LOSSES))

    @register_loss("squared-hinge", n_negatives=4)
    def squared_hinge(scores, log_q):
        return (1 - scores[:, :1] + scores[:, 1:]).clamp(min=0).square().mean()

    assert make_loss("squared-hinge") is squared_hinge
    assert recommender.LOSSES["squared-hinge"].kind == "listwise"
    assert recommender.LOSSES["squared-hinge"].n_negatives == 4
    with pytest.raises(UserError, match="unknown loss 'hinge'; known: mse, "):
        make_loss("hinge")


PACKAGE = {
    "acme_recommenders.py": """
from dataclasses import dataclass

import torch

from widedeep_nb import Recommender


@dataclass
class Newest(Recommender):
    "Rank items by the time of their last interaction."

    tasks = ("ranking",)
    search_space = {"ranking": {"days": (1.0, 100.0, "log")}}
    days: float = 10.0

    def _fit(self, split):
        last = torch.zeros(split.n_train_items + 1, dtype=torch.float64)
        time = split.train["timestamp"].cast(int).to_torch().double()
        item = split.train["item"].to_torch().long()
        last.scatter_reduce_(0, item, time, "amax")
        age = (last.max() - last) / 86_400_000
        self.value = torch.exp(-age / self.days).float()

    def _scores(self, users, history, items):
        return self.value[items.clamp(max=self.n_items)].expand(len(users), -1)
""",
    "acme_recommenders-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: acme-recommenders\nVersion: 1.0\n",
    "acme_recommenders-1.0.dist-info/entry_points.txt": """
[widedeep_nb.recommenders]
newest = acme_recommenders:Newest
""",
}


@pytest.fixture
def acme(tmp_path):
    "Install a package that has a recommender: an environment in which Python finds it."
    for name, text in PACKAGE.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = [str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def python(code, environment, cwd):
    "Run a few lines of Python and return what they print."
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_recommender_of_another_package_is_found(acme, tmp_path):
    code = "from widedeep_nb import check_recommender, make_recommender\n"
    code += "print(check_recommender('newest').name, make_recommender('newest', days=3.).days)"
    assert python(code, acme, tmp_path).split() == ["newest", "3.0"]


@pytest.mark.long
def test_a_recommender_of_another_package_is_tuned_evaluated_and_listed(acme, tmp_path):
    command = [sys.executable, "-m", "widedeep_nb.lib.cli", "run", "--dataset", "demo?ratings=2500"]
    command += ["--out", str(tmp_path / "run"), "--chapters", "01-13"]
    for setting in ("seeds=1", "epochs=2", "trials=2", "time_budget_min=0.05", "tune=False"):
        command += ["-p", setting]
    done = subprocess.run(command, env=acme, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = widedeep_nb.Run(tmp_path / "run")
    tuned = {m["model"]: m for m in run.read("tuning.json")["models"]}
    assert set(tuned["newest"]["settings"]) == {"days"}
    assert [o["trials"] for o in tuned["newest"]["objectives"]] == [2]
    measured = run.metrics().filter(model="newest", split="test", metric="NDCG@20", users="all")
    assert len(measured) and measured["value"].is_between(0, 1).all()
    assert (run.folder / "models/newest/model.safetensors").exists()
    assert "newest" in (run.folder / "index.html").read_text()


# --- the public face

PUBLIC = "load prepare evaluate make_recommender load_recommender register Run Split Protocol Recommender".split()


def test_the_public_names_are_imported_when_they_are_asked_for(tmp_path):
    code = "import sys, widedeep_nb\nprint('torch' in sys.modules, *widedeep_nb.__all__)\n"
    loaded, *names = python(code, os.environ, tmp_path).split()
    assert loaded == "False" and set(PUBLIC) <= set(names)
    for name in PUBLIC:
        assert getattr(widedeep_nb, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(widedeep_nb, "nothing")


def test_from_a_log_to_a_list_with_the_public_names_only(tmp_path):
    "Read, split, fit, evaluate, save, load and recommend, as in the README."
    from widedeep_nb import load, load_recommender, make_recommender, prepare

    log, items, users, *_ = load("demo?ratings=2500")
    split = prepare(log, "strict", items, users)
    model = make_recommender("item-knn").fit(split)
    model.save(tmp_path / "model")
    recommended = load_recommender(tmp_path / "model").recommend([{split.items["item"][0]: 5}], k=3)
    assert recommended.columns == ["user", "item", "score", "rank"] and len(recommended) == 3
    assert recommended.equals(model.recommend([{split.items["item"][0]: 5}], k=3))
