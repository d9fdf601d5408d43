"""Where files lie: on this machine's disk, or on object storage (gs://, s3://)."""
