"""What is there: checkpoints, their structure, layers, vocabularies and adapters."""
