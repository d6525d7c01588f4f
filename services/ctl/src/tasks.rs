//! Commands on tasks: listing, watching, and what may be said to one; and what they did to epochs.

use slotmesh_proto::{store::v1::OperatorChoice, task::v1 as task};

use crate::{
    api::Api,
    command::{ChoiceArg, ScheduleArgs, TaskCommand},
    failure::Failure,
    progress::{self, Watcher},
    render::{Output, show, show_line},
    views::{EpochView, StepView, TaskView, WatchedView},
};

/// The largest page that a controller gives.
const PAGE_SIZE_MAX: u32 = 1000;

/// Does a `task` command.
///
/// # Errors
/// As the controller answered; [`Failure::TaskEnded`] when a watched task did not end Done.
pub async fn on_task(api: &mut Api, command: TaskCommand, output: Output) -> Result<(), Failure> {
    let changed = match command {
        TaskCommand::List {
            instance,
            kinds,
            states,
            shard,
            since,
            limit,
        } => {
            let filter = task::ListTasksRequest {
                instance_id: instance,
                kinds,
                states,
                shard_id: shard,
                created_after: since,
                ..task::ListTasksRequest::default()
            };
            let views = list(api, filter, limit as usize).await?;
            return Ok(show(output, &views)?);
        }
        TaskCommand::Show { task, steps } => {
            let task = api.task(&task).await?;
            let parts = task.steps.clone().into_iter().filter(|_| steps);
            let view = TaskView {
                steps: parts.map(StepView::from).collect(),
                ..TaskView::from(task)
            };
            return Ok(show(output, &view)?);
        }
        TaskCommand::Watch { task, from } => {
            let ended = progress::watch(api, &task, from, &mut Printer { output }).await?;
            return progress::require_done(&ended);
        }
        TaskCommand::Cancel { task, client_token } => {
            let request = task::CancelTaskRequest {
                task_id: task,
                client_token: Api::token(Some(client_token)),
            };
            api.call(|api| {
                let request = request.clone();
                async move { api.tasks().cancel_task(request).await }
            })
            .await?
            .task
        }
        TaskCommand::Reschedule {
            task,
            schedule: when,
            client_token,
        } => {
            let request = task::RescheduleTaskRequest {
                task_id: task,
                schedule: schedule(&when),
                client_token: Api::token(Some(client_token)),
            };
            api.call(|api| {
                let request = request.clone();
                async move { api.tasks().reschedule_task(request).await }
            })
            .await?
            .task
        }
        TaskCommand::Resolve {
            task,
            choice,
            client_token,
        } => {
            let request = task::ResolveTaskRequest {
                task_id: task,
                choice: choice_value(choice).into(),
                client_token: Api::token(Some(client_token)),
            };
            api.call(|api| {
                let request = request.clone();
                async move { api.tasks().resolve_task(request).await }
            })
            .await?
            .task
        }
    };
    match changed {
        Some(task) => Ok(show(output, &TaskView::from(task))?),
        None => Ok(()),
    }
}

/// Shows which node was the primary of which epoch.
///
/// # Errors
/// As the controller answered.
pub async fn epochs(
    api: &mut Api,
    instance_id: String,
    shard_id: String,
    output: Output,
) -> Result<(), Failure> {
    let request = task::ListEpochsRequest {
        instance_id,
        shard_id,
        page_size: PAGE_SIZE_MAX,
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.tasks().list_epochs(request).await }
        })
        .await?;
    let views: Vec<_> = answer.epochs.into_iter().map(EpochView::from).collect();
    Ok(show(output, &views)?)
}

/// When a task may begin; `None`: now.
pub fn schedule(args: &ScheduleArgs) -> Option<task::Schedule> {
    let when = match (&args.at, args.in_window) {
        (Some(at), _) => task::schedule::When::At(at.clone()),
        (None, true) => task::schedule::When::InMaintenanceWindow(true),
        (None, false) => return None,
    };
    Some(task::Schedule { when: Some(when) })
}

fn choice_value(choice: ChoiceArg) -> OperatorChoice {
    match choice {
        ChoiceArg::Retry => OperatorChoice::Retry,
        ChoiceArg::Undo => OperatorChoice::Undo,
        ChoiceArg::AcceptLoss => OperatorChoice::AcceptLoss,
        ChoiceArg::Pause => OperatorChoice::Pause,
        ChoiceArg::Resume => OperatorChoice::Resume,
        ChoiceArg::Finalize => OperatorChoice::Finalize,
    }
}

async fn list(
    api: &mut Api,
    filter: task::ListTasksRequest,
    limit: usize,
) -> Result<Vec<TaskView>, Failure> {
    let mut views: Vec<TaskView> = Vec::new();
    let mut page_token = String::new();
    while views.len() < limit {
        let missing = u32::try_from(limit - views.len()).unwrap_or(PAGE_SIZE_MAX);
        let request = task::ListTasksRequest {
            page_size: missing.min(PAGE_SIZE_MAX),
            page_token,
            ..filter.clone()
        };
        let answer = api
            .call(|api| {
                let request = request.clone();
                async move { api.tasks().list_tasks(request).await }
            })
            .await?;
        views.extend(answer.tasks.into_iter().map(TaskView::from));
        page_token = answer.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    Ok(views)
}

/// Events as results: one line each on stdout.
#[derive(Debug)]
struct Printer {
    output: Output,
}

impl Watcher for Printer {
    fn event(&mut self, event: &task::TaskEvent, task: Option<&task::Task>) -> Result<(), Failure> {
        show_line(self.output, &WatchedView::new(event.clone(), task))?;
        Ok(())
    }
}
