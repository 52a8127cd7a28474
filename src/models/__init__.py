"""Language models, and the LightningModules that train, measure and evaluate them."""
