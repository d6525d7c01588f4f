//! Brings a node to its assignment: the pure decision's actions as commands.
//!
//! Invariant: an epoch is in the journal before anything is granted for it.

use slotmesh_proto::agent::v1::ProcessState;

use super::Worker;
use crate::{
    control::{COMMAND_TIMEOUT, Control, ControlError},
    fence,
    handover::{Role, driver::set_login},
    node::{Action, Assigned, Decision, FROZEN, Observed, decide, facts},
    probe::Info,
};

/// Each round ends with a look at what it has done; what needs more than this is left to the next
/// turn.
const ROUNDS_MAX: u32 = 3;

/// Parameters that are the agent's own: changing them would break fencing or take the node from it.
const OWNED_PARAMETERS: &[&str] = &[
    "aclfile",
    "appenddirname",
    "appendfilename",
    "appendonly",
    "bind",
    "daemonize",
    "databases",
    "dir",
    "logfile",
    "masterauth",
    "masteruser",
    "pidfile",
    "port",
    "primaryauth",
    "primaryuser",
    "protected-mode",
    "replica-announce-ip",
    "replica-announce-port",
    "replicaof",
    "requirepass",
    "slaveof",
    "supervised",
    "unixsocket",
    "unixsocketperm",
];

impl Worker {
    pub(super) async fn converge(&mut self, assigned: &Assigned) {
        if self.report.loading {
            return;
        }
        if let Err(error) = self.remember(assigned).await {
            self.report.error = format!("journal: {error}");
            tracing::error!(node = %self.node_id, %error, "assignment not journaled, not applied");
            return;
        }
        self.set_parameters(assigned).await;
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
                    match self.stand(assigned.spec.epoch).await {
                        Ok(()) => self.report.assigned_epoch = assigned.spec.epoch,
                        Err(error) => self.report.error = format!("journal: {error}"),
                    }
                    return;
                }
                Decision::Act(actions) => actions,
            };
            for action in actions {
                tracing::info!(node = %self.node_id, epoch = assigned.spec.epoch, action = name(&action), "converging");
                if let Err(error) = self.apply(action).await {
                    let why = crate::handover::driver::chain(&error);
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

    /// Journals that the process agrees with the record.
    async fn stand(&self, epoch: u64) -> Result<(), crate::journal::JournalError> {
        let journal = &self.host.journal;
        let fact = journal
            .read(|memory| facts::when_converged(memory, &self.node_id, &self.run.run_id, epoch));
        journal.append(Vec::from_iter(fact)).await
    }

    async fn decide(&mut self, assigned: &Assigned) -> Decision {
        let spec = &assigned.spec;
        let (fence, standing, journaled_epoch) = self.host.journal.read(|memory| {
            let fence = memory.fence(&self.node_id).cloned();
            let standing = memory.standing(&self.node_id).cloned();
            (
                fence,
                standing,
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
            users: &self.run.users,
            login: self.run.login.as_ref(),
            fence: fence.as_ref(),
            fence_target_online: target_online,
            standing: standing.as_ref(),
            journaled_epoch,
        };
        decide(assigned, &seen)
    }

    async fn apply(&mut self, action: Action) -> Result<(), ControlError> {
        let modern = self.run.is_modern();
        let Some(control) = self.admin().await else {
            return Err(ControlError::Connect {
                source: std::io::ErrorKind::NotConnected.into(),
            });
        };
        match action {
            Action::Delete(users) => fence::delete(control, &users).await,
            Action::SoftFence(user) => fence::soft_fence(control, &user).await,
            Action::Grant(user) => fence::grant(control, &user, modern).await,
            Action::SetLogin(login) => {
                set_login(control, &login.user, &login.password).await?;
                self.run.login = Some(login);
                Ok(())
            }
            Action::Follow { host, port } => {
                control.call(&["REPLICAOF", &host, &port]).await.map(drop)
            }
        }
    }

    /// Parameters are no matter of epochs; a node gets them as soon as it answers.
    async fn set_parameters(&mut self, assigned: &Assigned) {
        for (parameter, value) in &assigned.spec.parameters {
            if self.run.parameters.get(parameter) == Some(value) {
                continue;
            }
            let name = parameter.to_ascii_lowercase();
            let result = if OWNED_PARAMETERS.contains(&name.as_str()) {
                Err("it belongs to the agent".to_owned())
            } else {
                match self.admin().await {
                    Some(control) => set_parameter(control, &name, value).await,
                    None => return,
                }
            };
            if let Err(why) = result {
                tracing::warn!(node = %self.node_id, parameter, %why, "parameter not set");
                self.report.error = format!("parameter {parameter} not set: {why}");
                if self.report.state() != ProcessState::Running {
                    return;
                }
            }
            // A refusal is final for this process and value; asking again would change nothing.
            self.run.parameters.insert(parameter.clone(), value.clone());
        }
    }
}

async fn set_parameter(control: &mut Control, name: &str, value: &str) -> Result<(), String> {
    let args = ["CONFIG", "SET", name, value];
    match control.call_within(&args, COMMAND_TIMEOUT).await {
        Ok(_) => Ok(()),
        Err(error) => Err(crate::handover::driver::chain(&error)),
    }
}

fn name(action: &Action) -> &'static str {
    match action {
        Action::Delete(_) => "delete users",
        Action::SoftFence(_) => "soft fence",
        Action::SetLogin(_) => "set login",
        Action::Follow { .. } => "follow",
        Action::Grant(_) => "grant",
    }
}
