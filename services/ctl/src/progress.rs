//! Follows a task to its end over WatchTask, whatever breaks in between.
//!
//! The stream is resumed after the last event seen, so an event is shown once and none is left
//! out; a stream that can't be resumed for a bounded number of tries ends the wait as failed.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use slotmesh_proto::{store::v1::TaskState, task::v1 as task};
use slotmesh_runtime::backoff::Backoff;

use crate::{
    api::Api,
    failure::Failure,
    gates,
    render::{self, Text},
    views::{ShardProgressView, TaskEventView, TaskView, task_state_name},
};

/// A leader election takes seconds; this many tries at up to two seconds each outlast several.
const RESUMES_MAX: u32 = 15;
const RESUME_FIRST: Duration = Duration::from_millis(100);
const RESUME_CAP: Duration = Duration::from_secs(2);

/// Who is told of events while they arrive.
pub trait Watcher {
    /// An event, and the task as it stood then (without it only from an older controller).
    ///
    /// # Errors
    /// Ends the watch, for instance because nobody reads any more.
    fn event(&mut self, event: &task::TaskEvent, task: Option<&task::Task>) -> Result<(), Failure>;
}

/// Follows a task from an event number (1 is the first) until it has ended.
///
/// # Errors
/// When the controller refuses, or no stream could be had for too long.
pub async fn watch(
    api: &mut Api,
    task_id: &str,
    from_event: u64,
    watcher: &mut dyn Watcher,
) -> Result<task::Task, Failure> {
    let mut next_event = from_event.max(1);
    let mut resumes_left = RESUMES_MAX;
    let mut backoff = Backoff::new(RESUME_FIRST, RESUME_CAP);
    loop {
        let before = next_event;
        let failure = match follow(api, task_id, &mut next_event, watcher).await {
            Ok(()) => {
                let task = api.task(task_id).await?;
                if has_ended(task.state()) {
                    return Ok(task);
                }
                None
            }
            Err(refused @ (Failure::Refused { .. } | Failure::Local(_))) => return Err(refused),
            Err(failure) => Some(failure),
        };
        if next_event > before {
            resumes_left = RESUMES_MAX;
            backoff.reset();
        }
        if resumes_left == 0 {
            return Err(failure.unwrap_or_else(|| {
                let message = "its event stream ends again and again".to_owned();
                Failure::TaskEnded {
                    task_id: task_id.into(),
                    state: "unknown".into(),
                    message,
                }
            }));
        }
        resumes_left -= 1;
        tokio::time::sleep(backoff.next_delay()).await;
    }
}

/// One stream, until it ends or breaks.
async fn follow(
    api: &mut Api,
    task_id: &str,
    next_event: &mut u64,
    watcher: &mut dyn Watcher,
) -> Result<(), Failure> {
    let request = task::WatchTaskRequest {
        task_id: task_id.into(),
        from_event: *next_event,
    };
    let mut stream = api
        .call(|api| {
            let request = request.clone();
            async move { api.tasks().watch_task(request).await }
        })
        .await?;
    loop {
        match stream.message().await {
            Ok(Some(task::WatchTaskResponse {
                event: Some(event),
                task,
            })) => {
                if event.number >= *next_event {
                    *next_event = event.number + 1;
                    watcher.event(&event, task.as_ref())?;
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return Ok(()),
            Err(status) => return Err(Failure::from_status(&status)),
        }
    }
}

/// Whether nothing more will happen to the task without a person.
pub fn has_ended(state: TaskState) -> bool {
    matches!(
        state,
        TaskState::Done | TaskState::RolledBack | TaskState::Cancelled | TaskState::NeedsOperator
    )
}

/// Turns a task that ended in any way but Done into a failure.
///
/// # Errors
/// [`Failure::TaskEnded`] for every other end.
pub fn require_done(task: &task::Task) -> Result<(), Failure> {
    if task.state() == TaskState::Done {
        return Ok(());
    }
    let shards = task.shards.iter().filter(|s| !s.message.is_empty());
    let mut message: Vec<String> = shards
        .map(|s| format!("shard {}: {}", s.shard_id, s.message))
        .collect();
    if !task.message.is_empty() {
        message.insert(0, task.message.clone());
    }
    if message.is_empty() {
        message.push("no reason given".to_owned());
    }
    Err(Failure::TaskEnded {
        task_id: task.task_id.clone(),
        state: task_state_name(task.state()),
        message: message.join("; "),
    })
}

/// Shows a task's progress on stderr: a bar on a terminal, one line an event elsewhere.
#[derive(Debug)]
pub struct Display {
    bar: Option<ProgressBar>,
    /// Which begin was told.
    begins: String,
}

impl Display {
    /// A display for a task that was just admitted.
    pub fn new(title: &str) -> Self {
        use std::io::IsTerminal;
        if !std::io::stderr().is_terminal() {
            return Self {
                bar: None,
                begins: String::new(),
            };
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) =
            ProgressStyle::with_template("{spinner} {prefix} [{bar:24}] {pos}/{len} {msg}")
        {
            bar.set_style(style);
        }
        bar.set_prefix(title.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self {
            bar: Some(bar),
            begins: String::new(),
        }
    }

    /// Says once when a task begins that waits for that; hours may pass without another event.
    fn note_begin(&mut self, task: &task::Task) {
        let view = TaskView::from(task.clone());
        let begins = view.begins().unwrap_or_default();
        if self.begins == begins {
            return;
        }
        begins.clone_into(&mut self.begins);
        let told = match begins {
            "" => return,
            begins => format!("scheduled: begins {begins}"),
        };
        match &self.bar {
            Some(bar) => bar.println(told),
            None => render::note(&told),
        }
    }
}

impl Watcher for Display {
    fn event(&mut self, event: &task::TaskEvent, task: Option<&task::Task>) -> Result<(), Failure> {
        let view = TaskEventView::from(event.clone());
        if let Some(task) = task {
            self.note_begin(task);
        }
        let gates = task.and_then(|t| gates_of(t, &view.shard_id));
        let Some(bar) = &self.bar else {
            render::note(&view.text());
            gates.iter().for_each(|line| render::note(line));
            return Ok(());
        };
        gates.iter().for_each(|line| bar.println(line));
        if let Some(task) = task {
            bar.set_length(u64::from(task.steps_total));
            bar.set_position(u64::from(task.steps_done));
        }
        bar.set_message(format!("{} {} {}", view.shard_id, view.step, view.message));
        Ok(())
    }
}

/// Those of the shard, of an upgrade under way.
fn gates_of(task: &task::Task, shard: &str) -> Option<String> {
    let found = task.shards.iter().find(|s| s.shard_id == shard)?;
    let view = ShardProgressView::from(found.clone());
    (!view.gates.is_empty()).then(|| gates::line_of(&view))
}

impl Drop for Display {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Waits for a task with a progress display and returns how it ended.
///
/// # Errors
/// As [`watch`]; how the task ended is for the caller to judge with [`require_done`].
pub async fn wait(api: &mut Api, task_id: &str, title: &str) -> Result<task::Task, Failure> {
    let mut display = Display::new(title);
    watch(api, task_id, 1, &mut display).await
}

/// The view of a task, for results.
pub fn view(task: &task::Task) -> TaskView {
    TaskView::from(task.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_done_counts_as_done() {
        let task = |state: TaskState| task::Task {
            task_id: "t-1".into(),
            state: state.into(),
            message: "lag".into(),
            ..Default::default()
        };
        assert!(require_done(&task(TaskState::Done)).is_ok());
        for state in [
            TaskState::RolledBack,
            TaskState::Cancelled,
            TaskState::NeedsOperator,
        ] {
            let failure = require_done(&task(state)).expect_err("not done");
            assert!(failure.to_string().contains("lag"), "{failure}");
        }
    }
}
