//! Runs a [`HandOver`] against a real node: each action becomes commands, each
//! answer an event.
//!
//! Invariant: the target's connection is open before the fence is placed, so nothing slow and
//! nothing that can be refused is left for the critical section but Redis itself.

use std::{collections::VecDeque, path::Path, time::Duration};

use slotmesh_proto::agent::v1::HandOver as Order;
use tokio::time::{Instant, sleep};

use super::{Action, Event, HandOver, Outcome, Phase, target};
use crate::{
    control::{Control, ControlError},
    controllers::{Commit, CommitAnswer, Controllers},
    fence::{self, Dialect},
    probe::Info,
};

/// The change usually takes one or two round trips. For so long they are made without a pause;
/// nobody else is served by the old primary at that time anyway.
const EAGER: Duration = Duration::from_millis(5);
/// Afterwards one GETACK and one look in each.
const PACE: Duration = Duration::from_millis(1);

/// What a hand-over works with.
pub struct Driver<'a> {
    pub order: &'a Order,
    pub socket: &'a Path,
    pub admin_user: &'a str,
    pub admin_secret: &'a str,
    pub dialect: Dialect,
    pub controllers: &'a Controllers,
    pub commit: Commit,
    pub deadline: Instant,
    /// Whether the host has the right to serve now: rights that ran out meanwhile are not restored.
    pub may_serve: &'a (dyn Fn() -> bool + Sync),
}

impl std::fmt::Debug for Driver<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The secret stays out of it.
        f.debug_struct("Driver")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    pub outcome: Outcome,
    pub critical: Option<Duration>,
    pub parts: Parts,
}

/// What of the time was not Redis's, so that a slow hand-over can be told from a slow machine or disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Parts {
    /// From the step's begin to its fence: its journal, the connection to the target.
    pub fence: Option<Duration>,
    /// From the change of roles until a controller said that the record names the target.
    pub commit: Option<Duration>,
}

impl Parts {
    /// As the step's answer says it, with the critical section.
    pub fn words(self, critical: Option<Duration>) -> String {
        let ms = |part: Option<Duration>| part.unwrap_or_default().as_secs_f64() * 1000.0;
        let (fence, critical, commit) = (ms(self.fence), ms(critical), ms(self.commit));
        format!("fence {fence:.1}, roles {critical:.1}, commit {commit:.1} ms")
    }
}

impl Driver<'_> {
    /// Drives `machine` with `first` to its end, or to the point where only an assignment can say
    /// how to go on: then `None`.
    pub async fn run(
        mut self,
        mut machine: HandOver,
        first: Event,
        origin: Instant,
        admin: &mut Control,
    ) -> Option<Done> {
        let mut target = None;
        let mut parts = Parts::default();
        let mut events = VecDeque::from([first]);
        let mut looked_since = None;
        while let Some(event) = events.pop_front() {
            let before = machine.phase();
            let (next, actions) = machine.step(event, origin.elapsed());
            machine = next;
            if before != machine.phase() {
                tracing::debug!(?event, phase = ?machine.phase(), "hand-over");
            }
            let observing = actions.contains(&Action::Observe);
            if observing && machine.phase() == Phase::CatchingUp {
                let since = *looked_since.get_or_insert_with(Instant::now);
                if since.elapsed() > EAGER {
                    sleep(PACE).await;
                }
            }
            for action in actions {
                match action {
                    Action::Finish(outcome) => {
                        return Some(Done {
                            outcome,
                            critical: machine.critical(),
                            parts,
                        });
                    }
                    action => {
                        let (act, began) = (action, Instant::now());
                        events.extend(self.act(act, &machine, admin, &mut target, origin).await);
                        match act {
                            Action::SoftFence => parts.fence = Some(began - origin),
                            Action::Commit => {
                                *parts.commit.get_or_insert_default() += began.elapsed();
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
        None
    }

    async fn act(
        &mut self,
        action: Action,
        machine: &HandOver,
        admin: &mut Control,
        target: &mut Option<Control>,
        origin: Instant,
    ) -> Option<Event> {
        // An unanswered command leaves the connection closed; the next one may still get through.
        if admin.is_closed()
            && let Ok(fresh) = Control::unix(self.socket, self.admin_user, self.admin_secret).await
        {
            *admin = fresh;
        }
        let order = self.order;
        Some(match action {
            Action::ReachTarget => {
                let user = &order.master_user;
                match Control::tcp(&order.target_address, user, &order.master_password).await {
                    Ok(control) => {
                        *target = Some(control);
                        Event::TargetReached
                    }
                    Err(error) => {
                        tracing::warn!(error = %chain(&error), "target of hand-over not reached");
                        Event::TargetUnreachable
                    }
                }
            }
            Action::SoftFence => match fence::soft_fence(admin, &order.proxy_user).await {
                Ok(()) => Event::FenceDone,
                Err(_) => Event::FenceFailed,
            },
            Action::SetMasterUser => {
                match set_login(admin, &order.master_user, &order.master_password).await {
                    Ok(()) => Event::MasterUserSet,
                    Err(_) => Event::MasterUserFailed,
                }
            }
            Action::CheckTarget => target::check(order, admin, self.deadline).await,
            Action::Failover => self.failover(admin).await,
            Action::GetAck => {
                self.get_ack(target).await;
                return None;
            }
            Action::Observe => self.observe(admin).await,
            Action::AbortFailover => match admin.call(&["FAILOVER", "ABORT"]).await {
                Ok(_) => Event::AbortDone,
                Err(_) => Event::AbortFailed,
            },
            // Who stood still in between wakes into a time in which another one may be the primary.
            Action::RestoreGrant if !(self.may_serve)() => Event::RestoreFailed,
            Action::RestoreGrant => {
                match fence::restore(admin, &order.proxy_user, self.dialect).await {
                    Ok(()) => Event::GrantRestored,
                    Err(_) => Event::RestoreFailed,
                }
            }
            Action::Commit => {
                let critical = machine.critical().unwrap_or_default();
                self.commit.critical_us = critical.as_micros() as u64;
                let answer = self.controllers.commit(&self.commit, self.deadline).await;
                tracing::debug!(?answer, at = ?origin.elapsed(), "commit of hand-over answered");
                match answer {
                    CommitAnswer::Accepted => Event::CommitAccepted,
                    CommitAnswer::Refused { primary_node_id } => Event::CommitRefused {
                        target_is_primary: primary_node_id == order.target_node_id,
                    },
                    CommitAnswer::Unreachable => Event::CommitUnreachable,
                }
            }
            Action::Finish(_) => return None,
        })
    }

    async fn failover(&self, admin: &mut Control) -> Event {
        let Some((host, port)) = self.order.target_address.rsplit_once(':') else {
            return Event::FailoverRefused;
        };
        let timeout_ms = self.order.failover_timeout_ms.max(1).to_string();
        let args = ["FAILOVER", "TO", host, port, "TIMEOUT", &timeout_ms];
        match admin.call(&args).await {
            Ok(_) => Event::FailoverAccepted,
            Err(ControlError::Refused(why)) => {
                tracing::warn!(%why, "FAILOVER refused");
                Event::FailoverRefused
            }
            Err(ControlError::Connect { .. }) => Event::FailoverRefused,
            Err(ControlError::Unanswered { .. }) => Event::FailoverUnanswered,
        }
    }

    /// Nobody answers it; a broken connection is made anew, because without an acknowledgement the
    /// change waits for up to a second.
    async fn get_ack(&self, target: &mut Option<Control>) {
        let order = self.order;
        if target.as_ref().is_none_or(Control::is_closed) {
            *target = Control::tcp(
                &order.target_address,
                &order.master_user,
                &order.master_password,
            )
            .await
            .ok();
        }
        if let Some(control) = target {
            let _ = control.tell(&["REPLCONF", "GETACK", "*"]).await;
        }
    }

    async fn observe(&self, admin: &mut Control) -> Event {
        let seen = Info::read(admin, "replication").await.ok();
        match seen.and_then(|info| info.observation(&self.order.target_address)) {
            Some(seen) => Event::RoleObserved(seen),
            None => Event::Unobservable,
        }
    }
}

/// With which the node will log in at its primary.
pub async fn set_login(
    control: &mut Control,
    user: &str,
    password: &str,
) -> Result<(), ControlError> {
    control.call(&["CONFIG", "SET", "masteruser", user]).await?;
    control
        .call(&["CONFIG", "SET", "masterauth", password])
        .await?;
    Ok(())
}

/// An error with its causes, for the one place that logs it.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_says_what_of_its_time_was_not_the_engines() {
        let parts = Parts {
            fence: Some(Duration::from_micros(1_240)),
            commit: Some(Duration::from_millis(30)),
        };
        let words = parts.words(Some(Duration::from_micros(2_960)));
        assert_eq!(words, "fence 1.2, roles 3.0, commit 30.0 ms");
        let resumed = Parts::default().words(None);
        assert_eq!(resumed, "fence 0.0, roles 0.0, commit 0.0 ms");
    }
}
