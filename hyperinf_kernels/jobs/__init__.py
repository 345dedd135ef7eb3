"""One file per command: request, rows, model, scores, files. `run(request)` gives its document."""
