//! The critical section of a planned switchover, decided by one pure machine on the old primary's
//! agent: fence, turn over, watch, commit, or put everything back.
//!
//! Invariant: rights of the old epoch are restored only while it is certain that the target was not
//! promoted, and the commit is sent only after it is certain that it was. Everything between is
//! `Uncertain`, with the old primary left fenced, which is safe for as long as it lasts.
//!
//! The machine is total: `(state, event, now) -> (state, actions)`, with no clock and no I/O, so that
//! a simulation drives it as well as [`driver`] does.
//!
//! What makes a fact certain here (`O` old primary, `N` target):
//!
//! * `FAILOVER` was not accepted: `O` can't have handed over. Restoring is safe.
//! * `O` is a master, no failover is under way, and `N` is an online replica of `O`: `N` is not
//!   promoted. Restoring is safe. A mere "`O` is a master" is not enough: when `N`'s answer to
//!   `PSYNC … FAILOVER` is lost, `O` takes itself for refused and becomes a master again although
//!   `N` is one too.
//! * `O` follows `N` and no failover is under way: `N` answered `PSYNC … FAILOVER` with yes, hence is
//!   promoted. Committing is safe.

pub mod driver;
mod target;

use std::time::Duration;

/// What the old primary said about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observation {
    pub role: Role,
    pub link: Link,
    pub failover: Failover,
    /// A replica whose master is the target. Meaningless for a master.
    pub follows_target: bool,
    /// A master that has the target as an online replica. Meaningless for a replica.
    pub target_online: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Primary,
    Replica,
}

/// A replica's link to its master.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    Up,
    Syncing,
    Down,
}

/// `master_failover_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failover {
    None,
    WaitingForSync,
    InProgress,
}

/// What the newest assignment says about this node, for a hand-over found unfinished after a
/// restart of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// No assignment has arrived since the restart.
    Unknown,
    /// This node is the primary at the hand-over's epoch, frozen or not.
    Unchanged,
    /// A higher epoch, or another primary.
    MovedOn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Begin a new hand-over.
    Begin,
    /// The agent restarted with this hand-over begun and not finished. `None`: the process that the
    /// hand-over was about is gone.
    Restarted {
        observed: Option<Observation>,
        record: Record,
    },
    TargetReached,
    TargetUnreachable,
    FenceDone,
    FenceFailed,
    MasterUserSet,
    MasterUserFailed,
    /// The target has all that the old primary wrote.
    TargetSound,
    /// It has not, or could not say so.
    TargetUnsound(&'static str),
    FailoverAccepted,
    FailoverRefused,
    /// No answer to `FAILOVER`: it may be under way.
    FailoverUnanswered,
    RoleObserved(Observation),
    /// The old primary did not answer.
    Unobservable,
    AbortDone,
    AbortFailed,
    GrantRestored,
    RestoreFailed,
    CommitAccepted,
    /// The record is not this hand-over's any more.
    CommitRefused {
        target_is_primary: bool,
    },
    CommitUnreachable,
    /// Nothing but time passed.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Open the connection to the target on which `GETACK` will be sent.
    ReachTarget,
    SoftFence,
    SetMasterUser,
    /// Ask the target, whose engine is older, whether it has refused something of the stream; answer
    /// with `TargetSound` or `TargetUnsound`.
    CheckTarget,
    Failover,
    /// Make the target acknowledge its offset now.
    GetAck,
    /// Ask the old primary for its role; answer with `RoleObserved` or `Unobservable`.
    Observe,
    AbortFailover,
    RestoreGrant,
    Commit,
    Finish(Outcome),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub why: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The target is the primary. `committed`: by this agent.
    Done { committed: bool },
    /// Nothing was changed, or all was put back.
    NoEffect,
    /// The old primary may be fenced and the target may be promoted.
    Uncertain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    New,
    Reaching,
    Fencing,
    Steering,
    Checking,
    Ordering,
    CatchingUp,
    Aborting,
    /// After an abort: only an observation can tell which side won.
    Judging,
    Restoring,
    Committing,
    /// After a restart, before an assignment told what the record says.
    Resuming,
    Finished(Outcome),
}

/// One hand-over. Times are durations since any fixed instant, the same for all calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandOver {
    phase: Phase,
    deadline: Duration,
    fenced_at: Option<Duration>,
    critical: Option<Duration>,
    failover_may_run: bool,
    /// The target's engine is older: it is asked before it is told to take over.
    checks_target: bool,
    refusal: Option<&'static str>,
}

impl HandOver {
    pub fn new(deadline: Duration) -> Self {
        Self {
            phase: Phase::New,
            deadline,
            fenced_at: None,
            critical: None,
            failover_may_run: false,
            checks_target: false,
            refusal: None,
        }
    }

    /// The same, with a look at the target when the old primary can write nothing more.
    pub fn checking_target(self, checks_target: bool) -> Self {
        Self {
            checks_target,
            ..self
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn outcome(&self) -> Option<Outcome> {
        match self.phase {
            Phase::Finished(outcome) => Some(outcome),
            _ => None,
        }
    }

    /// From the fence to the observed change of role.
    pub fn critical(&self) -> Option<Duration> {
        self.critical
    }

    /// The one transition function. Events that mean nothing in a phase change nothing.
    pub fn step(mut self, event: Event, now: Duration) -> (Self, Vec<Action>) {
        let late = now >= self.deadline;
        let actions = match (self.phase, event) {
            (Phase::Finished(_), _) => vec![],

            (Phase::New | Phase::Resuming, Event::Restarted { observed, record }) => {
                self.resume(observed, record, now)
            }
            (Phase::New, Event::Begin) if late => self.finish(no_effect("no time was left")),
            (Phase::New, Event::Begin) => self.go(Phase::Reaching, Action::ReachTarget),

            // Nothing has been changed yet.
            (Phase::Reaching, Event::TargetUnreachable) => {
                self.finish(no_effect("the target did not accept the replication user"))
            }
            (Phase::Reaching, Event::TargetReached) if late => {
                self.finish(no_effect("no time was left"))
            }
            (Phase::Reaching, Event::TargetReached) => {
                self.fenced_at = Some(now);
                self.go(Phase::Fencing, Action::SoftFence)
            }

            // Fenced or perhaps fenced; O has not been told to hand over, so going back is safe.
            (Phase::Fencing, Event::FenceFailed)
            | (Phase::Steering, Event::MasterUserFailed)
            | (Phase::Ordering, Event::FailoverRefused) => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Phase::Fencing, Event::FenceDone) if late => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Phase::Fencing, Event::FenceDone) => self.go(Phase::Steering, Action::SetMasterUser),
            (Phase::Steering, Event::MasterUserSet) if late => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Phase::Steering, Event::MasterUserSet) if self.checks_target => {
                self.go(Phase::Checking, Action::CheckTarget)
            }
            (Phase::Checking, Event::TargetUnsound(why)) => {
                self.refusal = Some(why);
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Phase::Checking, Event::TargetSound) if late => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Phase::Steering, Event::MasterUserSet) | (Phase::Checking, Event::TargetSound) => {
                self.failover_may_run = true;
                self.go(Phase::Ordering, Action::Failover)
            }

            // From here on only what is observed counts.
            (Phase::Ordering, Event::FailoverAccepted | Event::FailoverUnanswered) => {
                self.phase = Phase::CatchingUp;
                vec![Action::GetAck, Action::Observe]
            }
            (Phase::CatchingUp, Event::RoleObserved(seen)) => self.watch(seen, now),
            (Phase::CatchingUp, Event::Unobservable) if late => {
                self.finish(uncertain("the old primary does not answer"))
            }
            (Phase::CatchingUp, Event::Unobservable | Event::Tick) => {
                vec![Action::GetAck, Action::Observe]
            }

            (Phase::Aborting, Event::AbortDone | Event::AbortFailed) => {
                self.go(Phase::Judging, Action::Observe)
            }
            (Phase::Judging, Event::RoleObserved(seen)) => self.judge(seen, now),
            (Phase::Judging, Event::Unobservable) => {
                self.finish(uncertain("the old primary does not answer"))
            }

            (Phase::Restoring, Event::GrantRestored) => {
                let why = "the role change did not happen; rights were restored";
                self.finish(no_effect(self.refusal.unwrap_or(why)))
            }
            (Phase::Restoring, Event::RestoreFailed) => {
                self.finish(uncertain("the old primary's rights could not be restored"))
            }

            (Phase::Committing, Event::CommitAccepted) => self.finish(done(true)),
            (
                Phase::Committing,
                Event::CommitRefused {
                    target_is_primary: true,
                },
            ) => self.finish(done(false)),
            (
                Phase::Committing,
                Event::CommitRefused {
                    target_is_primary: false,
                },
            ) => self.finish(uncertain("roles changed, but the record has moved on")),
            (Phase::Committing, Event::CommitUnreachable | Event::Tick) if late => {
                self.finish(uncertain("roles changed, but no controller could commit"))
            }
            (Phase::Committing, Event::CommitUnreachable) => vec![Action::Commit],

            (_, _) => vec![],
        };
        (self, actions)
    }

    fn watch(&mut self, seen: Observation, now: Duration) -> Vec<Action> {
        let late = now >= self.deadline;
        match (seen.role, seen.failover) {
            (Role::Replica, Failover::None) if seen.follows_target => {
                self.measure(now);
                match seen.link {
                    Link::Up | Link::Syncing => self.go(Phase::Committing, Action::Commit),
                    // The target was promoted and may have died since: it took no write, and the
                    // controller may still prefer to go back.
                    Link::Down if late => self.finish(uncertain("the target is gone again")),
                    Link::Down => vec![Action::Observe],
                }
            }
            (Role::Replica, Failover::None) => {
                self.finish(uncertain("the old primary follows somebody else"))
            }
            // FAILOVER's own timeout, or a refusal by the target.
            (Role::Primary, Failover::None) if seen.target_online => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            (Role::Primary, Failover::None) if late => {
                self.finish(uncertain("it is not known whether the target was promoted"))
            }
            // The target's link may come back within the deadline and prove that it is a replica.
            (Role::Primary, Failover::None) => vec![Action::Observe],
            (_, _) if late => self.go(Phase::Aborting, Action::AbortFailover),
            (_, _) => vec![Action::GetAck, Action::Observe],
        }
    }

    /// After an abort, once.
    fn judge(&mut self, seen: Observation, now: Duration) -> Vec<Action> {
        match (seen.role, seen.failover) {
            (Role::Primary, Failover::None) if seen.target_online || !self.failover_may_run => {
                self.go(Phase::Restoring, Action::RestoreGrant)
            }
            // The abort came too late: the change has happened after all.
            (Role::Replica, Failover::None) if seen.follows_target && seen.link != Link::Down => {
                self.measure(now);
                self.go(Phase::Committing, Action::Commit)
            }
            (_, _) => self.finish(uncertain("it is not known whether the target was promoted")),
        }
    }

    /// After a restart the journal only says that the hand-over had begun, so the table of crashes
    /// is looked up by what is observed:
    ///
    /// * O follows N: the change happened; go forward and commit (row 6c–6e, Ao).
    /// * O hands over right now: watch it as if nothing had happened, with the old deadline.
    /// * O is a master: go back, but only when the record still says so, because a controller may
    ///   have gone forward with N while this agent was away, and only when N is an online replica.
    /// * The process is gone: an unplanned failover, which is not decided here.
    fn resume(
        &mut self,
        observed: Option<Observation>,
        record: Record,
        now: Duration,
    ) -> Vec<Action> {
        self.failover_may_run = true;
        let Some(seen) = observed else {
            return self.finish(uncertain("the old primary's process is gone"));
        };
        match (seen.role, seen.failover, record) {
            (Role::Replica, Failover::None, _) => {
                self.phase = Phase::CatchingUp;
                self.watch(seen, now)
            }
            (_, Failover::WaitingForSync | Failover::InProgress, _) => {
                self.phase = Phase::CatchingUp;
                vec![Action::GetAck, Action::Observe]
            }
            (Role::Primary, Failover::None, Record::Unknown) => {
                self.phase = Phase::Resuming;
                vec![]
            }
            (Role::Primary, Failover::None, Record::Unchanged) => {
                self.phase = Phase::Judging;
                self.judge(seen, now)
            }
            (Role::Primary, Failover::None, Record::MovedOn) => {
                self.finish(uncertain("the record moved on while the agent was away"))
            }
        }
    }

    fn measure(&mut self, now: Duration) {
        if self.critical.is_none() {
            self.critical = self.fenced_at.map(|at| now.saturating_sub(at));
        }
    }

    fn go(&mut self, phase: Phase, action: Action) -> Vec<Action> {
        self.phase = phase;
        vec![action]
    }

    fn finish(&mut self, outcome: Outcome) -> Vec<Action> {
        self.go(Phase::Finished(outcome), Action::Finish(outcome))
    }
}

fn done(committed: bool) -> Outcome {
    Outcome {
        verdict: Verdict::Done { committed },
        why: "",
    }
}

fn no_effect(why: &'static str) -> Outcome {
    Outcome {
        verdict: Verdict::NoEffect,
        why,
    }
}

fn uncertain(why: &'static str) -> Outcome {
    Outcome {
        verdict: Verdict::Uncertain,
        why,
    }
}

#[cfg(test)]
#[path = "handover_tests.rs"]
mod tests;
