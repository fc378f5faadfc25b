"""condiff-grade: facts stay with the judge, a submission's code runs in a sandbox, and only tensors pass between."""
