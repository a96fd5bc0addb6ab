"""The project's own benchmarks: ``python -m benchmarks NAME``. One module each; see README.md."""
