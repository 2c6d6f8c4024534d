"""How a rank of a training job ends, told to whoever started it: a launcher, a batch script, a person.

Any other code is a failure that a new start may not cure. 75 is EX_TEMPFAIL of sysexits.h.
"""

DONE_EXIT_CODE = 0
"""The last step is made and saved."""
STOPPED_EXIT_CODE = 75
"""Asked to stop: the job saved what it could and left before its last step. Start it again to go on."""
LOST_EXIT_CODE = 76
"""This rank left because of another one, whose code says more. Start the job again to go on."""
