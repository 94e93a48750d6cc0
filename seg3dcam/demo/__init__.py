"""A small trained model, and the brain scan with a known lesion that it is shown on."""
