"""`zemoe train`: language models with zero experts from text files.

    from zemoe.training.run import train
    from zemoe.training.settings import read

    end = train(read(Path("run.toml"), ["train.steps=200"]), resume=False, listener=print)

`zemoe.training.run` tells more.
"""
