"""What run_libero_eval.py is made of: policies, workers, the folder of results, statistics and the report."""
