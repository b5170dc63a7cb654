"""How the updates of one round become one; every rule is a `strategies.rules.rule.Rule`."""
