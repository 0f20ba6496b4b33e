"""Why a job waits, in plain words: SLURM's reasons explained."""

import re

from job.launch.slurm.jobs import Job

REASONS = (
    ("Resources", "waits for nodes that others use"),
    ("Priority", "other jobs come first"),
    ("BeginTime", "may not start before its time; a job that was put back into the queue waits some two minutes"),
    ("Cleaning", "was put back into the queue; its last start is being cleaned up"),
    ("Dependency", "waits for another job"),
    ("DependencyNeverSatisfied", "waits for another job in vain"),
    ("JobHeldUser", "is held: scontrol release JOB lets it go"),
    ("JobHeldAdmin", "is held by an administrator"),
    ("JobArrayTaskLimit", "as many tasks of its array run as may at once"),
    ("ReqNodeNotAvail", "the nodes it needs are down, drained or reserved"),
    ("Reservation", "waits for its reservation"),
    ("Licenses", "waits for a license"),
    ("PartitionDown|PartitionInactive", "its partition is closed: sinfo shows others"),
    ("PartitionTimeLimit", "its partition allows no job this long: lower --time"),
    ("PartitionNodeLimit", "its partition gives no job as many nodes: lower --nodes"),
    ("PartitionConfig", "its partition has no nodes of this shape: lower what a node must have, or use another"),
    ("BadConstraints", "no node has what it asks for"),
    ("AccountNotAllowed|InvalidAccount", "its account may not use the partition: give another with --account"),
    ("AssocGrp.*", "its account uses all that it may at once: waits until other jobs of the account end"),
    ("AssocMax.*PerJob.*", "it asks for more than its account may have in one job"),
    ("AssocMax.*", "you use all that your account lets one user have at once"),
    ("InvalidQOS|QOSNotAllowed", "its QOS may not be used here"),
    ("QOSMax.*PerJob.*|QOSMax\\w*PerNode.*|QOSMin.*", "it asks for more, or less, than its QOS lets one job have"),
    ("QOSMax.*", "you use all that its QOS lets one user have at once"),
    ("QOS.*", "all that its QOS may have at once is in use"),
    ("NodeDown|NodeFail", "a node of it failed"),
    ("JobLaunchFailure|launch.failed.*", "its start failed on a node"),
    ("None", "SLURM has not looked at it yet"),
)
"""The first that matches counts; longer names stand behind shorter ones, which must match whole."""
NEVER = re.compile(
    "PartitionTimeLimit|PartitionNodeLimit|PartitionConfig|BadConstraints|AccountNotAllowed|InvalidAccount|InvalidQOS"
    "|QOSNotAllowed|DependencyNeverSatisfied|AssocMax.*PerJob.*|QOSMax.*PerJob.*"
)


def in_words(job: Job) -> str:
    """Why it waits, with SLURM's own word behind it."""
    word = job.reason.partition(",")[0] or "None"
    said = next((said for pattern, said in REASONS if re.fullmatch(pattern, word)), "waits")
    return f"{said.replace('JOB', job.id)} ({job.reason or 'no reason yet'})"


def never_starts(reason: str) -> bool:
    """Whether waiting alone will not cure it."""
    return NEVER.fullmatch(reason.partition(",")[0]) is not None
