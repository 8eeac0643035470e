"""The entry of one rank: `python -m launch.rank train CONFIG [key=value ...]`, started by torchrun.

The same command line as `phi3v`, in a process that ends with its torchrun.
"""

from launch.watch import watch_parent

if __name__ == "__main__":
    watch_parent()
    from launch.cli import main

    main()
