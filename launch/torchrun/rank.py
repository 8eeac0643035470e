"""The entry of one rank: `python -m launch.torchrun.rank train CONFIG [key=value ...]`, started by torchrun.

The same command line as `phi3v`, in a process that ends when its torchrun ends.
"""

from launch.torchrun.watch import watch_parent

if __name__ == "__main__":
    watch_parent()
    from launch.cli.main import main

    main()
