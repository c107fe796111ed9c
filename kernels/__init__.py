"""The operations of BERT, one a file: plain functions on tensors, each with a reference."""
