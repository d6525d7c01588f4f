//! Brings a node to its assignment: the pure decision's actions as commands.
//!
//! Invariant: an epoch is in the journal before anything is granted for it.

use slotmesh_proto::store::v1::NodeRole;

use super::Worker;
use crate::{
    control::{Control, ControlError},
    fence,
    handover::{
        Role,
        driver::{chain, set_login},
    },
    node::{Action, Assigned, Decision, FROZEN, Login, NOWHERE, Observed, decide, facts},
    probe::Info,
};

/// Each round ends with a look at what it has done; what needs more than this is left to the next
/// turn.
const ROUNDS_MAX: u32 = 3;

impl Worker {
    pub(super) async fn converge(&mut self, assigned: &Assigned) {
        self.report.detached &= assigned.spec.detached;
        if self.report.loading {
            return;
        }
        if let Err(error) = self.remember(assigned).await {
            self.report.error = format!("journal: {error}");
            tracing::error!(node = %self.node_id, %error, "assignment not journaled, not applied");
            return;
        }
        self.set_parameters(assigned).await;
        self.ensure_observer(assigned).await;
        self.host.lease.until_watched(assigned).await;
        for _ in 0..ROUNDS_MAX {
            let decision = self.decide(assigned).await;
            let actions = match decision {
                Decision::Leave(why) => {
                    if why != FROZEN {
                        self.report.error = why.to_owned();
                    }
                    return;
                }
                Decision::Act(actions) if actions.is_empty() => {
                    match self.stand(assigned).await {
                        Ok(()) => self.converged(assigned),
                        Err(error) => self.report.error = format!("journal: {error}"),
                    }
                    return;
                }
                Decision::Act(actions) => actions,
            };
            self.report.detached = false;
            for action in actions {
                tracing::info!(node = %self.node_id, epoch = assigned.spec.epoch, action = name(&action), "converging");
                let done = match action {
                    Action::Capture { replid, tail } => self.capture(assigned, &replid, tail).await,
                    action => self.apply(action).await.map_err(|error| chain(&error)),
                };
                if let Err(why) = done {
                    tracing::warn!(node = %self.node_id, %why, "node not converged");
                    self.report.error = why;
                    return;
                }
            }
            if !self.probe().await {
                return;
            }
        }
    }

    /// Journals what must be known before the assignment may have effects.
    async fn remember(&mut self, assigned: &Assigned) -> Result<(), crate::journal::JournalError> {
        let journal = &self.host.journal;
        let facts =
            journal.read(|memory| facts::before_convergence(memory, &self.node_id, assigned));
        journal.append(facts).await
    }

    /// Journals a freeze also while the process does not answer: a target that stood still in its
    /// hand-over may promote itself when it wakes, and only who knows of the freeze may demote it.
    pub(super) async fn remember_freeze(&mut self, assigned: &Assigned) {
        if assigned.spec.frozen
            && let Err(error) = self.remember(assigned).await
        {
            // Tried again at the next look; until then nothing follows from the freeze.
            tracing::error!(node = %self.node_id, %error, "freeze not journaled");
        }
    }

    /// Journals that the process agrees with the record.
    async fn stand(&self, assigned: &Assigned) -> Result<(), crate::journal::JournalError> {
        let journal = &self.host.journal;
        let run_id = &self.run.run_id;
        let fact =
            journal.read(|memory| facts::when_converged(memory, &self.node_id, run_id, assigned));
        journal.append(Vec::from_iter(fact)).await
    }

    /// There was nothing left to do, and the report was made after the last thing that was done.
    fn converged(&mut self, assigned: &Assigned) {
        self.report.assigned_epoch = assigned.spec.epoch;
        self.report.assigned_membership = assigned.spec.membership;
        self.report.detached =
            assigned.spec.detached && self.report.observed_role() == NodeRole::Replica;
    }

    pub(super) async fn decide(&mut self, assigned: &Assigned) -> Decision {
        let spec = &assigned.spec;
        let lost_epoch = self.lost_epoch(assigned);
        let (fence, standing, captured, journaled_epoch) = self.host.journal.read(|memory| {
            let fence = memory.fence(&self.node_id).cloned();
            let standing = memory.standing(&self.node_id).cloned();
            (
                fence,
                standing,
                memory.has_captured(&self.node_id, &self.run.run_id, lost_epoch),
                memory.epoch(&spec.instance_id, &spec.shard_id),
            )
        });
        let Some(control) = self.admin().await else {
            return Decision::Leave("the node does not answer");
        };
        // Decided on what is true now, not at the last probe.
        let Ok(info) = Info::read(control, "replication").await else {
            return Decision::Leave("the node does not answer");
        };
        let following = info.following();
        let target = fence
            .as_ref()
            .map_or("", |mark| mark.target_address.as_str());
        let target_online = info
            .observation(target)
            .is_some_and(|seen| seen.target_online);
        let seen = Observed {
            run_id: &self.run.run_id,
            role: info.role().unwrap_or(Role::Replica),
            failover: info.failover(),
            following: &following,
            link: info.link(),
            history: info.history(),
            captured,
            users: &self.run.users,
            login: self.run.login.as_ref(),
            fence: fence.as_ref(),
            fence_target_online: target_online,
            standing: standing.as_ref(),
            journaled_epoch,
            serving_right: self.host.lease.may_serve(assigned),
        };
        decide(assigned, &seen)
    }

    async fn apply(&mut self, action: Action) -> Result<(), ControlError> {
        let dialect = self.run.dialect();
        let Some(control) = self.admin().await else {
            return Err(not_connected());
        };
        match action {
            Action::Delete(users) => fence::delete(control, &users).await,
            Action::SoftFence(user) => fence::soft_fence(control, &user).await,
            Action::Grant(user) => fence::grant(control, &user, dialect).await,
            Action::SetLogin(login) => {
                set_login(control, &login.user, &login.password).await?;
                self.run.login = Some(login);
                Ok(())
            }
            Action::Detach => {
                detach(control).await?;
                self.run.login = Some(Login::default());
                Ok(())
            }
            // See `capture`.
            Action::Capture { .. } => Ok(()),
            Action::Follow { host, port } => {
                control.call(&["REPLICAOF", &host, &port]).await.map(drop)
            }
        }
    }

    /// No matter of epochs either: its rights need no fence, so even a process that the record does
    /// not name may have it.
    async fn ensure_observer(&mut self, assigned: &Assigned) {
        let wanted = Login {
            user: assigned.spec.observer_user.clone(),
            password: assigned.spec.observer_password.clone(),
        };
        if self.run.observer.as_ref() == Some(&wanted)
            || !fence::is_observer(&wanted.user)
            || wanted.password.is_empty()
        {
            return;
        }
        let dialect = self.run.dialect();
        let Some(control) = self.admin().await else {
            return;
        };
        match fence::grant_observer(control, &wanted.user, &wanted.password, dialect).await {
            Ok(()) => self.run.observer = Some(wanted),
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(node = %self.node_id, %why, "observer not granted");
            }
        }
    }
}

fn not_connected() -> ControlError {
    ControlError::Connect {
        source: std::io::ErrorKind::NotConnected.into(),
    }
}

/// One command breaks the link and ends a handshake or a full sync that is under way, so that no
/// byte comes after it, and keeps what the replica needs to continue elsewhere.
async fn detach(control: &mut Control) -> Result<(), ControlError> {
    if let Some((host, port)) = NOWHERE.rsplit_once(':') {
        control.call(&["REPLICAOF", host, port]).await?;
    }
    set_login(control, "", "").await
}

fn name(action: &Action) -> &'static str {
    match action {
        Action::Detach => "detach",
        Action::Capture { .. } => "capture",
        Action::Delete(_) => "delete users",
        Action::SoftFence(_) => "soft fence",
        Action::SetLogin(_) => "set login",
        Action::Follow { .. } => "follow",
        Action::Grant(_) => "grant",
    }
}
