//! `TaskService`: shows tasks, streams their events, and asks a task to end without effect.

use std::collections::HashSet;

use slotmesh_proto::{
    store::v1 as records,
    task::v1::{self as api, task_service_server::TaskService},
};
use slotmesh_task::{Task, admit::RefusalKind, wire};
use slotmesh_topology::TaskId;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Context, MessageStream, refuse, store_failed};
use crate::{
    clock,
    drive::write::put_task,
    leader::LeaderOutcome,
    mirror::Versioned,
    store::keys::{self, Key},
};

/// Most tasks in a page.
const PAGE_SIZE_MAX: u32 = 1_000;
/// Tasks in a page when the caller does not say.
const PAGE_SIZE_DEFAULT: u32 = 100;
/// Events buffered for a watcher that reads slowly; then it is waited for.
const EVENTS_BUFFERED: usize = 16;
/// Tries of a cancel that loses a race against the task's own progress.
const CANCEL_TRIES: usize = 5;

/// The service.
#[derive(Clone, Debug)]
pub struct Tasks {
    context: Context,
}

impl Tasks {
    /// The service over what it needs.
    #[must_use]
    pub fn new(context: Context) -> Self {
        Self { context }
    }

    #[allow(clippy::result_large_err)]
    fn task(&self, id: &str) -> Result<Versioned<Task>, Status> {
        let key = TaskId::from(id);
        self.context
            .mirror
            .read(|s| s.tasks.get(&key).cloned())
            .ok_or_else(|| {
                refuse(
                    RefusalKind::NotFound,
                    "TASK_NOT_FOUND",
                    format!("there is no task {id}; ListTasks lists them"),
                )
            })
    }
}

#[tonic::async_trait]
impl TaskService for Tasks {
    async fn get_task(
        &self,
        request: Request<api::GetTaskRequest>,
    ) -> Result<Response<api::GetTaskResponse>, Status> {
        let task = self.task(&request.into_inner().task_id)?;
        Ok(Response::new(api::GetTaskResponse {
            task: Some(show(&task.value)),
        }))
    }

    async fn list_tasks(
        &self,
        request: Request<api::ListTasksRequest>,
    ) -> Result<Response<api::ListTasksResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => PAGE_SIZE_DEFAULT,
            size if size <= PAGE_SIZE_MAX => size,
            _ => {
                return Err(refuse(
                    RefusalKind::Invalid,
                    "PAGE_SIZE_INVALID",
                    format!("page_size is 1 to {PAGE_SIZE_MAX}"),
                ));
            }
        };
        let states: HashSet<_> = request.states().collect();
        let mut tasks: Vec<_> = self.context.mirror.read(|state| {
            state
                .tasks
                .values()
                .rev()
                .map(|t| &t.value)
                .filter(|t| request.page_token.is_empty() || t.id.as_str() < &*request.page_token)
                .filter(|t| {
                    request.instance_id.is_empty() || t.instance.as_str() == request.instance_id
                })
                .filter(|t| states.is_empty() || states.contains(&wire::state_to(t.state)))
                .take(size as usize + 1)
                .map(show)
                .collect()
        });
        let has_more = tasks.len() > size as usize;
        tasks.truncate(size as usize);
        let last = tasks.last().map(|t| t.task_id.clone()).unwrap_or_default();
        let next_page_token = if has_more { last } else { String::new() };
        Ok(Response::new(api::ListTasksResponse {
            tasks,
            next_page_token,
        }))
    }

    type WatchTaskStream = MessageStream<api::WatchTaskResponse>;

    async fn watch_task(
        &self,
        request: Request<api::WatchTaskRequest>,
    ) -> Result<Response<Self::WatchTaskStream>, Status> {
        let request = request.into_inner();
        self.task(&request.task_id)?;
        let (sender, receiver) = mpsc::channel(EVENTS_BUFFERED);
        let (service, id) = (self.clone(), request.task_id);
        let from = request.from_event.max(1);
        tokio::spawn(async move {
            if let Err(status) = service.send_events(&id, from, &sender).await {
                // A watcher that left needs no answer.
                let _ = sender.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel_task(
        &self,
        request: Request<api::CancelTaskRequest>,
    ) -> Result<Response<api::CancelTaskResponse>, Status> {
        let id = request.into_inner().task_id;
        for _ in 0..CANCEL_TRIES {
            let term = self.context.leading()?;
            let task = self.task(&id)?;
            if task.value.cancel_requested && !task.value.state.is_ended() {
                return Ok(Response::new(api::CancelTaskResponse {
                    task: Some(show(&task.value)),
                }));
            }
            if !task.value.is_cancellable() {
                return Err(refuse(
                    RefusalKind::Precondition,
                    "NOT_CANCELLABLE",
                    if task.value.state.is_ended() {
                        "the task has ended"
                    } else {
                        "the task is past its point of no return and will finish"
                    },
                ));
            }
            let next = Task {
                cancel_requested: true,
                ..task.value.clone()
            };
            let txn = term
                .txn()
                .unchanged(Key::Task { task: id.as_str() }, task.mod_revision);
            let txn = put_task(
                txn,
                next,
                "",
                "CancelRequested",
                "an operator asked to cancel",
            );
            match txn
                .commit(&*self.context.store)
                .await
                .map_err(|e| store_failed(&e))?
            {
                LeaderOutcome::Committed { revision } => {
                    self.context.mirror.shows(revision).await;
                    let task = self.task(&id)?;
                    let task = Some(show(&task.value));
                    return Ok(Response::new(api::CancelTaskResponse { task }));
                }
                LeaderOutcome::Conflict | LeaderOutcome::Deposed => {
                    let mut state = self.context.mirror.subscribe();
                    let moved = state.wait_for(|s| {
                        s.tasks
                            .get(&TaskId::from(id.as_str()))
                            .is_none_or(|t| t.mod_revision != task.mod_revision)
                    });
                    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), moved).await;
                }
            }
        }
        Err(refuse(
            RefusalKind::Conflict,
            "CONFLICT",
            "the task moves on; try again",
        ))
    }
}

impl Tasks {
    /// Sends events from `next` on, until the one with which the task ends.
    async fn send_events(
        &self,
        id: &str,
        mut next: u64,
        sender: &mpsc::Sender<Result<api::WatchTaskResponse, Status>>,
    ) -> Result<(), Status> {
        let key = TaskId::from(id);
        let mut state = self.context.mirror.subscribe();
        loop {
            let waited = {
                let ready = state.wait_for(|s| {
                    s.tasks
                        .get(&key)
                        .is_none_or(|t| t.value.event_count >= next || t.value.state.is_ended())
                });
                tokio::select! {
                    ready = ready => ready.map(|s| s.tasks.get(&key).map(|t| t.value.clone())),
                    () = sender.closed() => return Ok(()),
                    () = self.context.stopping.cancelled() => return Err(stopping()),
                }
            };
            let Ok(Some(task)) = waited else {
                return Err(Status::unavailable(
                    "the controller is stopping; watch again",
                ));
            };
            while next <= task.event_count {
                let event_key = Key::TaskEvent {
                    task: id,
                    number: next,
                }
                .to_string();
                let item = self
                    .context
                    .store
                    .get(&event_key)
                    .await
                    .map_err(|e| store_failed(&e))?;
                if let Some(item) = item {
                    let record: records::TaskEventRecord =
                        keys::decode(&item).map_err(|e| store_failed(&e))?;
                    let event = api::WatchTaskResponse {
                        event: Some(show_event(record)),
                        task: Some(show(&task)),
                    };
                    if sender.send(Ok(event)).await.is_err() {
                        return Ok(());
                    }
                }
                next += 1;
            }
            if task.state.is_ended() {
                return Ok(());
            }
        }
    }
}

fn stopping() -> Status {
    Status::unavailable("the controller is stopping; watch again from the next event")
}

fn show(task: &Task) -> api::Task {
    wire::task_api(
        task,
        clock::rfc3339(task.created_ms),
        clock::rfc3339(task.updated_ms),
    )
}

fn show_event(record: records::TaskEventRecord) -> api::TaskEvent {
    api::TaskEvent {
        number: record.number,
        time: clock::rfc3339(record.unix_ms),
        state: record.state,
        shard_id: record.shard_id,
        step: record.step,
        message: record.message,
    }
}
