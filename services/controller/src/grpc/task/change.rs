//! What may be said to a task: end without effect, begin at another time, go on this way or that.
//!
//! Invariant: each is one transaction that compares the task as it was judged, so what was true when
//! it was accepted is still true when it is written.

use std::time::Duration;

use prost::Message as _;
use slotmesh_proto::task::v1 as api;
use slotmesh_task::{
    Choice, Spec, Task,
    admit::RefusalKind,
    proxies, schedule,
    table::{self, Cancel},
    upgrade, wire,
};
use slotmesh_topology::{Instance, TaskId};
use tonic::Status;

use super::Tasks;
use crate::{
    clock,
    drive::write::{put_instance, put_task},
    grpc::{
        instance::{
            again,
            schedule::{is_window, not_before},
        },
        refuse, refused, store_failed,
        token::Token,
    },
    leader::{LeaderOutcome, LeaderTxn},
    store::keys::Key,
};

/// Tries of a change that loses a race against the task's own progress.
const TRIES: usize = 5;
/// After a lost race: until the mirror shows who won.
const MIRROR_WAIT: Duration = Duration::from_secs(1);

/// The task as it will be, with the event that says so; `None`: it is so already.
type Changed = Option<(Task, &'static str, String)>;

impl Tasks {
    pub(super) async fn cancel(&self, request: api::CancelTaskRequest) -> Result<Task, Status> {
        let token = Token::of(
            &request.client_token,
            "CancelTask",
            request.task_id.as_bytes(),
        )?;
        self.change(&request.task_id, &token, |task| {
            if task.cancel_requested && !task.state.is_ended() {
                return Ok(None);
            }
            if !task.is_cancellable() {
                return Err(not_cancellable(task));
            }
            let next = Task {
                cancel_requested: true,
                ..task.clone()
            };
            let words = "an operator asked to cancel".to_owned();
            Ok(Some((next, "CancelRequested", words)))
        })
        .await
    }

    pub(super) async fn reschedule(
        &self,
        request: api::RescheduleTaskRequest,
    ) -> Result<Task, Status> {
        let body = api::RescheduleTaskRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(
            &request.client_token,
            "RescheduleTask",
            &body.encode_to_vec(),
        )?;
        self.change(&request.task_id, &token, |task| {
            if !schedule::is_scheduled(task) {
                return Err(refuse(
                    RefusalKind::Precondition,
                    "NOT_SCHEDULED",
                    "the task has begun, or was never scheduled; only one that waits for its time \
                     can be given another",
                ));
            }
            let instance = self.instance_of(task)?;
            let now_ms = clock::now_ms();
            // A task that waits for its time has one, also when that is now.
            let at_ms = not_before(request.schedule.as_ref(), &instance)?.max(1);
            let mut next = Task {
                not_before_ms: at_ms,
                in_window: is_window(request.schedule.as_ref()),
                deadline_ms: at_ms.max(now_ms)
                    + task.deadline_ms.saturating_sub(task.not_before_ms),
                ..task.clone()
            };
            // Parts go on in windows only when that is the last word.
            let in_window = is_window(request.schedule.as_ref());
            let has_parts = match &mut next.spec {
                Spec::Upgrade(upgrade) => Some(&mut upgrade.in_window),
                Spec::Proxies(changes) => Some(&mut changes.in_window),
                _ => None,
            };
            if let Some(of_parts) = has_parts {
                *of_parts = in_window;
                next.deadline_ms = task.deadline_ms.max(at_ms);
                // Nothing of it is looked for by its time.
                next.not_before_ms = match at_ms > now_ms {
                    true => at_ms,
                    false => 0,
                };
            }
            let words = format!("begins at {}", clock::rfc3339(at_ms.max(now_ms)));
            Ok(Some((next, "Rescheduled", words)))
        })
        .await
    }

    pub(super) async fn resolve(&self, request: api::ResolveTaskRequest) -> Result<Task, Status> {
        let Some(choice) = wire::choice_from(request.choice()) else {
            return Err(refuse(
                RefusalKind::Invalid,
                "CHOICE_MISSING",
                "choice must be one of those that the task offers",
            ));
        };
        let body = api::ResolveTaskRequest {
            client_token: String::new(),
            ..request.clone()
        };
        let token = Token::of(&request.client_token, "ResolveTask", &body.encode_to_vec())?;
        if choice == Choice::Retry {
            let task = self.task(&request.task_id)?;
            again::check_listed(&self.context, &task.value).await?;
        }
        self.change(&request.task_id, &token, |task| {
            if choice == Choice::Retry {
                again::check(&self.context, task)?;
            }
            let next = resolved(task, choice)?;
            let words = format!("an operator chose {}", choice.name());
            Ok(Some((next, "Resolved", words)))
        })
        .await
    }

    async fn change(
        &self,
        id: &str,
        token: &Token,
        decide: impl Fn(&Task) -> Result<Changed, Status>,
    ) -> Result<Task, Status> {
        for _ in 0..TRIES {
            let term = self.context.leading()?;
            if token.earlier(&self.context).await?.is_some() {
                return Ok(self.task(id)?.value);
            }
            let task = self.task(id)?;
            let Some((next, step, words)) = decide(&task.value)? else {
                return Ok(task.value);
            };
            let mut txn = term
                .txn()
                .unchanged(Key::Task { task: id }, task.mod_revision);
            if task.value.state.is_ended() && !next.state.is_ended() {
                txn = self.with_instance(txn, &task.value);
            }
            let txn = token.put(put_task(txn, next, "", step, &words), id, "");
            let outcome = txn.commit(&*self.context.store).await;
            match outcome.map_err(|e| store_failed(&e))? {
                LeaderOutcome::Committed { revision } => {
                    self.context.mirror.shows(revision).await;
                    return Ok(self.task(id)?.value);
                }
                LeaderOutcome::Conflict | LeaderOutcome::Deposed => {
                    let mut state = self.context.mirror.subscribe();
                    let moved = state.wait_for(|s| {
                        s.tasks
                            .get(&TaskId::from(id))
                            .is_none_or(|t| t.mod_revision != task.mod_revision)
                    });
                    let _ = tokio::time::timeout(MIRROR_WAIT, moved).await;
                }
            }
        }
        Err(refuse(
            RefusalKind::Conflict,
            "CONFLICT",
            "the task moves on; try again",
        ))
    }

    /// Writes the instance as it is: of a task that is taken up again, and another that is admitted at the
    /// same time, one has to look again.
    fn with_instance(&self, txn: LeaderTxn, task: &Task) -> LeaderTxn {
        let found = self
            .context
            .mirror
            .read(|s| s.instances.get(&task.instance).cloned());
        let Some(instance) = found else { return txn };
        put_instance(txn, instance.mod_revision, &instance.value)
    }

    #[allow(clippy::result_large_err)]
    fn instance_of(&self, task: &Task) -> Result<Instance, Status> {
        let found = self
            .context
            .mirror
            .read(|s| s.instances.get(&task.instance).map(|i| i.value.clone()));
        found.ok_or_else(|| {
            refuse(
                RefusalKind::NotFound,
                "INSTANCE_NOT_FOUND",
                "the task's instance is gone",
            )
        })
    }
}

#[allow(clippy::result_large_err)]
fn resolved(task: &Task, choice: Choice) -> Result<Task, Status> {
    if !schedule::menu(task).contains(&choice) {
        return Err(refused(&schedule::refused_choice(task, choice)));
    }
    match (&task.spec, choice) {
        (_, Choice::Retry) => schedule::retried(task, clock::now_ms()).map_err(|r| refused(&r)),
        (Spec::Upgrade(_), _) => Ok(upgrade::resolved(task, choice, clock::now_ms())),
        (Spec::Proxies(_), _) => Ok(proxies::resolved(task, choice, clock::now_ms())),
        (Spec::Failover(_) | Spec::Replace(_) | Spec::Provision, _) => Ok(Task {
            choice: Some(choice),
            ..task.clone()
        }),
        _ => Err(refused(&schedule::not_on_the_menu(task))),
    }
}

fn not_cancellable(task: &Task) -> Status {
    let why = match table::cancel(task) {
        Cancel::Refused(why) => why,
        Cancel::Honoured => "the task moves on; try again",
    };
    refuse(RefusalKind::Precondition, "NOT_CANCELLABLE", why)
}
