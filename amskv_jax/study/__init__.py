"""The study: every policy drawn and measured under equal conditions."""
