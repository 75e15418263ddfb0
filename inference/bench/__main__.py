from configs import cli
from inference.bench.engines import bench

if __name__ == "__main__":
    cli.main(bench, name="python -m inference.bench")
