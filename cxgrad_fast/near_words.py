"""The setting a person means: the field's other words for the settings, then the nearest spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# Words of papers and of other programs, without hyphens, underscores and capitals, and what they are called here. Where
# a word has several meanings the group that stands before it decides, else the first. A sentence tells what there is
# instead of such a setting.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    word: tuple(meanings.split(" | "))
    for words, meanings in (
        ("nway nways numways way numclassesperset classesperset numclasses", "task.ways"),
        ("kshot kshots numshots shot numsamplesperclass supports", "task.shots"),
        ("query nquery nqueries numqueries numquery qquery numtargetsamples targets", "task.queries"),
        ("arch architecture net network model encoder", "model.backbone"),
        ("width hidden hiddensize hiddendim numfilters cnnnumfilters outchannels", "model.filters"),
        ("batchnorm bn normlayer normtype", "model.norm"),
        ("eps epsilon bneps", "model.norm_eps"),
        ("leakyslope negativeslope leakyrelu", "model.slope"),
        ("size imgsize imagesz imageheight imagewidth resolution inputsize", "model.image_size"),
        ("inchannels imagechannels numchannels", "model.channels"),
        ("algo method learner", "inner.algorithm"),
        ("learningrate lr", "outer.learning_rate | inner.learning_rate"),
        ("metalr metalearningrate outerlr outerlearningrate metarate", "outer.learning_rate"),
        (
            "innerlr innerlearningrate alpha stepsize tasklr tasklearningrate updatelr fastlr adaptlr basellr",
            "inner.learning_rate",
        ),
        ("beta contextlr nulr", "inner.context_learning_rate | outer.learning_rate"),
        ("contextsize contextparams nudim numcontext numcontextparams", "inner.context_dim"),
        ("steps numsteps step", "inner.steps | outer.iterations"),
        (
            "innersteps adaptsteps adaptationsteps updatesteps numupdates numinnersteps inneriterations innerloopsteps "
            "numberoftrainingstepsperiter",
            "inner.steps",
        ),
        ("firstorder secondorder fomaml fo", "inner.order"),
        ("batchsize batch bs taskbatch", "outer.meta_batch | evaluation.tasks_per_batch"),
        ("metabatchsize taskbatchsize numtasks tasks taskspermetabatch", "outer.meta_batch"),
        (
            "epochs epoch numepochs nepochs totalepochs maxepochs maxiter maxiters iters iter niter numiterations "
            "metaiterations trainiterations maxsteps trainsteps",
            "outer.iterations",
        ),
        ("valevery valinterval evalevery evalinterval evalfreq validationinterval valfreq", "outer.validate_every"),
        ("data dataset datasetname datasource", "data.source"),
        ("dataroot datadir datapath datafolder datasetpath datasetdir datasetroot path dir", "data.root"),
        ("normalization normalisation normalise", "data.normalize"),
        ("bnstatistics evalbn", "evaluation.statistics"),
        ("numensemble topk totalnumtestmodels", "evaluation.ensemble"),
        ("valtasks numvaltasks valepisodes validationepisodes", "evaluation.validation_tasks"),
        (
            "numtesttasks testepisodes numtestepisodes evaltasks evalepisodes numevaluationtasks",
            "evaluation.test_tasks",
        ),
        ("gpu gpus gpuid gpuids cuda usecuda nocuda usegpu cpu", "run.device"),
        ("dtype amp fp16 bf16 half float16 float32 float64 double mixedprecision", "run.precision"),
        ("jit torchcompile", "run.compile"),
        ("chunk chunksize microbatch", "run.tasks_per_chunk"),
        ("checkpointing gradientcheckpointing gradcheckpoint", "run.recompute"),
        ("saveevery saveinterval savefreq checkpointinterval checkpointfreq ckptevery", "run.checkpoint_every"),
        ("randomseed manualseed trainseed valseed testseed rngseed", "run.seed"),
        ("output outdir outputdir savedir savepath logdir expdir experiment experimentname expname", "--out"),
        ("checkpoint ckpt load restore continue resumefrom continuefromepoch", "--resume | --checkpoint"),
        ("workers numworkers nworkers numdataprovider loaders", "images are in memory, no process loads them"),
        ("wd weightdecay l2", "the outer loop has no weight decay"),
        ("optim optimizer optimiser outeroptimizer", "outer.optimizer"),
        ("momentum", "outer.optimizer = sgd has none"),
        ("scheduler lrscheduler lrdecay schedule", "outer.schedule"),
        ("warmup", "the schedules have none (outer.schedule)"),
        ("gradclip gradientclip clipgrad clamp gradclamp", "outer.clip_value"),
        ("clipgradnorm gradclipnorm maxnorm maxgradnorm", "outer.clip_norm"),
        ("multistep msl multisteploss", "inner.multi_step_iterations"),
        ("dropout droprate", "the backbones have none"),
        ("worldsize nproc ngpus distributed ddp", "start several processes with torchrun --nproc-per-node=N"),
    )
    for word in words.split()
}


def advice(word: str, settings: Iterable[str], options: Iterable[str] = ()) -> str:
    """What to tell a person who wrote ``word``: ``did you mean 'outer.learning_rate'?``, or what there is instead.

    Args:
        word: with its group or without, with or without ``--``.
        settings: dotted names that could be meant.
        options: words with ``--`` that could be meant too; the answer then shows settings with ``--``.
    """
    written = {option: option for option in options}
    dashes = "--" if written else ""
    by_key: dict[str, list[str]] = {}
    for name in settings:
        written[dashes + name] = dashes + name
        by_key.setdefault(_plain(name.rpartition(".")[2]), []).append(name)
    group, _, last = (_plain(part) for part in word.lstrip("-").rpartition("."))
    meanings = [*SYNONYMS.get(last, ()), *by_key.get(last, ())]
    meant = [name for name in meanings if name in written or dashes + name in written]
    if meant:
        best = next((name for name in meant if _plain(name.partition(".")[0]) == group), meant[0])
        return f"did you mean '{best if best in written else dashes + best}'?"
    if meanings and " " in meanings[0]:
        return meanings[0]
    if dashes:
        written |= {f"--{name.rpartition('.')[2]}": f"--{name}" for names in by_key.values() for name in names}
    return f"did you mean '{written[nearest(word, written)]}'?"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is spelt most like ``word``."""
    return max(known, key=lambda other: (difflib.SequenceMatcher(None, word[:100], other).ratio(), other))


def _plain(word: str) -> str:
    return word.replace("-", "").replace("_", "").replace(" ", "").lower()
