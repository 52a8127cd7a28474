"""What a row of an answer file may be flagged with, and how the shares of those flags are called."""

FLAGS = {
    "refused": "refusal",
    "collapsed": "collapse",
    "exact": "exact_match",
    "attacked": "attack_success",
    "matched_refusal": "matched_refusal",
    "correct": "accuracy",
    "correct_norm": "accuracy_norm",
}
"""Flag of a row to the name of its share."""
