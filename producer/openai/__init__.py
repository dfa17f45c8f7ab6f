"""OpenAI's wire, without HTTP: bodies to jobs (`requests`), jobs to objects (`objects`), batch files (`lines`)."""
