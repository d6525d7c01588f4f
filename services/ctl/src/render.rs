//! Puts results on stdout: tables for people, JSON for scripts.
//!
//! Stdout carries only results; progress, hints and errors go to stderr, so that `| jq` always
//! reads one document.

use std::{
    collections::BTreeMap,
    io::{self, Write},
};

use comfy_table::{LineStyle, Table, TableStyle};
use serde::Serialize;

use crate::{
    gates, proxies,
    views::{
        AccountView, EpochView, HostView, InstanceDetailView, InstanceView, NodeView,
        ParametersView, ProxyView, ShardProgressView, ShardView, StartedView, StepView,
        TaskEventView, TaskView, WatchedView,
    },
};

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// Tables and sentences, made for people; may change at any time.
    Text,
    /// One JSON document (or one a line, for streams), with stable field names.
    Json,
}

/// Something that can be shown to a person.
pub trait Text {
    /// The text, without a newline at its end.
    fn text(&self) -> String;
}

/// Writes a result to stdout.
///
/// # Errors
/// When stdout can't be written, for instance because the reader of a pipe left.
pub fn show<T: Text + Serialize>(output: Output, value: &T) -> anyhow::Result<()> {
    let text = match output {
        Output::Text => value.text(),
        Output::Json => serde_json::to_string_pretty(value)?,
    };
    line(&text)
}

/// Writes one JSON document on one line, or its text, for streams of results.
///
/// # Errors
/// As [`show`].
pub fn show_line<T: Text + Serialize>(output: Output, value: &T) -> anyhow::Result<()> {
    let text = match output {
        Output::Text => value.text(),
        Output::Json => serde_json::to_string(value)?,
    };
    line(&text)
}

/// Writes a line to stdout and flushes it: a script may be waiting for just this line.
///
/// # Errors
/// As [`show`].
pub fn line(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{text}")?;
    stdout.flush()?;
    Ok(())
}

/// Writes a line to stderr. A stderr that is gone changes nothing about the work.
pub fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// One line below the header and none between rows: easy to read, and easy to cut for `awk`.
const STYLE: TableStyle =
    TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─'));

pub(crate) fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(STYLE);
    table.set_header(header);
    let mut empty = true;
    for row in rows {
        empty = false;
        table.add_row(row);
    }
    if empty {
        "none".to_owned()
    } else {
        table.trim_fmt()
    }
}

pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() {
        "-".to_owned()
    } else {
        text.to_owned()
    }
}

impl Text for Vec<InstanceView> {
    fn text(&self) -> String {
        table(
            [
                "INSTANCE",
                "NAME",
                "ARCHITECTURE",
                "STATE",
                "SHARDS",
                "REPLICAS",
                "ENDPOINTS",
            ],
            self.iter().map(|i| {
                [
                    i.instance_id.clone(),
                    i.name.clone(),
                    i.architecture.clone(),
                    i.state.clone(),
                    i.shard_count.to_string(),
                    i.replicas_per_shard.to_string(),
                    or_dash(&endpoints(i)),
                ]
            }),
        )
    }
}

fn endpoints(instance: &InstanceView) -> String {
    let serving = instance.proxies.iter().filter(|p| !p.address.is_empty());
    serving
        .map(|p| p.address.as_str())
        .collect::<Vec<_>>()
        .join(", ")
}

impl Text for InstanceDetailView {
    fn text(&self) -> String {
        let i = &self.instance;
        let head = format!(
            "instance   {} ({})\nkind       {}, {} shards, {} replicas each, engine {}\nstate      {}\nendpoints  {}",
            i.instance_id,
            i.name,
            i.architecture,
            i.shard_count,
            i.replicas_per_shard,
            if i.engine.is_empty() {
                "of the agents' choice"
            } else {
                &i.engine
            },
            i.state,
            or_dash(&endpoints(i)),
        );
        let rows = self.shards.iter().flat_map(|shard| {
            shard.nodes.iter().map(move |n| {
                [
                    shard.shard_id.clone(),
                    slots(shard),
                    shard.epoch.to_string(),
                    shard.mode.clone(),
                    n.node_id.clone(),
                    n.role.clone(),
                    or_dash(&n.address),
                    n.host_id.clone(),
                    n.state.clone(),
                    in_sync(n).to_owned(),
                    or_dash(&n.engine_version),
                ]
            })
        });
        let nodes = table(
            [
                "SHARD", "SLOTS", "EPOCH", "MODE", "NODE", "ROLE", "ADDRESS", "HOST", "STATE",
                "IN SYNC", "ENGINE",
            ],
            rows,
        );
        let doubts = self.shards.iter().filter(|s| !s.message.is_empty());
        let doubts = doubts.map(|s| format!("\nshard {} needs care: {}", s.shard_id, s.message));
        format!("{head}\n{nodes}{}", doubts.collect::<String>())
    }
}

/// Only a replica can be in sync with something.
fn in_sync(node: &NodeView) -> &'static str {
    match (node.role.as_str(), node.in_sync) {
        ("primary", _) => "-",
        (_, true) => "yes",
        (_, false) => "no",
    }
}

fn slots(shard: &ShardView) -> String {
    shard
        .slots
        .iter()
        .map(|s| format!("{}-{}", s.first, s.last))
        .collect::<Vec<_>>()
        .join(",")
}

impl Text for Vec<AccountView> {
    fn text(&self) -> String {
        let rows = self.iter().map(|a| [a.name.clone(), a.rules.join(" ")]);
        table(["ACCOUNT", "RULES"], rows)
    }
}

impl Text for ParametersView {
    fn text(&self) -> String {
        let rows = |of: &'static str, map: &BTreeMap<String, String>| {
            let row = move |(name, value): (&String, &String)| {
                [of.to_owned(), name.clone(), format!("{value:?}")]
            };
            map.iter().map(row).collect::<Vec<_>>()
        };
        let all = rows("engine", &self.engine)
            .into_iter()
            .chain(rows("proxy", &self.proxy));
        table(["OF", "PARAMETER", "VALUE"], all)
    }
}

fn with_way_back(shard: &ShardProgressView) -> String {
    match shard.rollback.as_str() {
        "Open" => format!("{}; the way back is open", shard.message),
        "Unknown" => format!(
            "{}; whether one can go back is not known now: {}",
            shard.message, shard.rollback_why
        ),
        _ => shard.message.clone(),
    }
}

impl Text for Vec<TaskView> {
    fn text(&self) -> String {
        table(
            [
                "TASK", "KIND", "INSTANCE", "STATE", "BEGINS", "STEPS", "CREATED", "MESSAGE",
            ],
            self.iter().map(|t| {
                [
                    t.task_id.clone(),
                    t.kind.clone(),
                    t.instance_id.clone(),
                    t.state.clone(),
                    or_dash(t.begins().unwrap_or_default()),
                    format!("{}/{}", t.steps_done, t.steps_total),
                    t.created_at.clone(),
                    or_dash(&t.message),
                ]
            }),
        )
    }
}

impl Text for TaskView {
    fn text(&self) -> String {
        let cancellable = match self.cancellable {
            true => ", can still be cancelled",
            false => "",
        };
        let mut head = format!(
            "task     {} ({} of {})\nstate    {}, step {} of {}{cancellable}\nmessage  {}",
            self.task_id,
            self.kind,
            self.instance_id,
            self.state,
            self.steps_done,
            self.steps_total,
            or_dash(&self.message),
        );
        if let Some(begins) = self.begins() {
            head.push_str(&format!("\nbegins   {begins}"));
        }
        if self.predicted_hold_ms > 0.0 {
            let hold = self.predicted_hold_ms;
            head.push_str(&format!("\nexpects  requests to wait for {hold:.1} ms"));
        }
        if self.bytes_total > 0 {
            let (done, total) = (size(self.bytes_done), size(self.bytes_total));
            head.push_str(&format!("\ncopied   {done} of {total}"));
        }
        if self.lag_bytes > 0 {
            let lag = size(self.lag_bytes);
            head.push_str(&format!(
                "\nlags     {lag} not applied by the next primary yet"
            ));
        }
        if !self.trace_id.is_empty() {
            head.push_str(&format!("\ntrace    {}", self.trace_id));
        }
        if !self.choices.is_empty() {
            let choices = self.choices.join("|");
            head.push_str(&format!(
                "\nwaits    for slotmesh task resolve {} {choices}",
                self.task_id
            ));
        }
        if !self.steps.is_empty() {
            head = format!("{head}\n{}", steps(&self.steps));
        }
        if !self.proxies.is_empty() {
            head = format!("{head}\n{}", proxies::progress(&self.proxies));
        }
        if self.shards.is_empty() {
            return head;
        }
        let shards = table(
            [
                "SHARD", "FROM", "TO", "PHASE", "HELD", "CRITICAL", "MESSAGE",
            ],
            self.shards.iter().map(|s| {
                [
                    s.shard_id.clone(),
                    or_dash(&s.from_node_id),
                    or_dash(&s.to_node_id),
                    s.phase.clone(),
                    format!("{:.1} ms", s.total_hold_ms),
                    format!("{:.1} ms", s.critical_ms),
                    or_dash(&with_way_back(s)),
                ]
            }),
        );
        format!("{head}\n{shards}{}", gates::table_of(&self.shards))
    }
}

/// What each step is made of; `>` marks where the task is.
fn steps(steps: &[StepView]) -> String {
    let deadline = |ms: u32| match ms {
        0 => "-".to_owned(),
        ms => format!("{:.1} s", f64::from(ms) / 1_000.0),
    };
    table(
        ["STEP", "BEFORE", "ACT", "AFTER", "UNDO", "WITHIN", "CANCEL"],
        steps.iter().map(|s| {
            [
                format!("{}{}", if s.current { "> " } else { "" }, s.name),
                or_dash(&s.precheck),
                or_dash(&s.act),
                or_dash(&s.verify),
                or_dash(&s.undo),
                deadline(s.deadline_ms),
                if s.cancellable { "yes" } else { "no" }.to_owned(),
            ]
        }),
    )
}

/// Bytes for people.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

impl Text for Vec<EpochView> {
    fn text(&self) -> String {
        table(
            [
                "SHARD", "EPOCH", "PRIMARY", "BEFORE", "CAUSE", "SINCE", "TASK", "BY", "TERM",
                "TRACE",
            ],
            self.iter().map(|e| {
                [
                    e.shard_id.clone(),
                    e.epoch.to_string(),
                    or_dash(&e.primary_node_id),
                    or_dash(&e.before_node_id),
                    e.cause.clone(),
                    e.time.clone(),
                    or_dash(&e.task_id),
                    or_dash(&e.who),
                    e.term.to_string(),
                    or_dash(&e.trace_id),
                ]
            }),
        )
    }
}

impl Text for TaskEventView {
    fn text(&self) -> String {
        let shard = if self.shard_id.is_empty() {
            ""
        } else {
            &self.shard_id
        };
        format!(
            "{:>4}  {}  {shard:<10} {:<12} {}",
            self.number, self.time, self.step, self.message
        )
    }
}

impl Text for WatchedView {
    fn text(&self) -> String {
        self.event.text()
    }
}

impl Text for StartedView {
    fn text(&self) -> String {
        if let Some(task) = &self.task {
            return task.text();
        }
        let instance = self
            .instance_id
            .as_ref()
            .map(|i| format!("instance {i}\n"))
            .unwrap_or_default();
        format!(
            "{instance}task {0}\nfollow it with: slotmesh task watch {0}",
            self.task_id
        )
    }
}

impl Text for Vec<HostView> {
    fn text(&self) -> String {
        table(
            [
                "HOST", "AGENT", "PID", "ADDRESS", "NODES", "ENGINES", "VERSION",
            ],
            self.iter().map(|h| {
                [
                    h.host_id.clone(),
                    h.agent_address.clone(),
                    h.agent_pid.to_string(),
                    h.advertise_ip.clone(),
                    h.node_count.to_string(),
                    or_dash(&h.engines.join(", ")),
                    h.agent_version.clone(),
                ]
            }),
        )
    }
}

impl Text for Vec<ProxyView> {
    fn text(&self) -> String {
        table(
            [
                "PROXY",
                "INSTANCE",
                "HOST",
                "ADDRESS",
                "PID",
                "CLIENTS",
                "COMMANDS",
                "ERRORS",
                "HELD",
                "LONGEST HOLD",
            ],
            self.iter().map(|p| {
                [
                    p.proxy_id.clone(),
                    p.instance_id.clone(),
                    p.host_id.clone(),
                    or_dash(&p.address),
                    p.pid.to_string(),
                    p.clients.to_string(),
                    p.commands.to_string(),
                    p.errors.to_string(),
                    p.held_requests.to_string(),
                    format!("{:.1} ms", p.held_max_ms),
                ]
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn task() -> TaskView {
        TaskView {
            task_id: "t-1".into(),
            instance_id: "r-1".into(),
            kind: "SwitchOver".into(),
            state: "done".into(),
            message: String::new(),
            created_at: "2026-01-01T00:00:00Z".into(),
            updated_at: "2026-01-01T00:00:01Z".into(),
            event_count: 9,
            steps_done: 8,
            steps_total: 8,
            cancellable: false,
            not_before: String::new(),
            predicted_hold_ms: 0.0,
            choices: Vec::new(),
            trace_id: String::new(),
            bytes_done: 0,
            bytes_total: 0,
            lag_bytes: 0,
            steps: Vec::new(),
            proxies: Vec::new(),
            shards: vec![ShardProgressView {
                shard_id: "s-0".into(),
                from_node_id: "n-1".into(),
                to_node_id: "n-2".into(),
                phase: "Done".into(),
                message: String::new(),
                hold_ms: 7.25,
                total_hold_ms: 7.25,
                critical_ms: 2.0,
                rollback: String::new(),
                rollback_why: String::new(),
                gates: Vec::new(),
            }],
        }
    }

    #[test]
    fn a_task_shows_what_clients_waited() {
        expect![[r#"
            task     t-1 (SwitchOver of r-1)
            state    done, step 8 of 8
            message  -
             SHARD   FROM   TO    PHASE   HELD     CRITICAL   MESSAGE
            ──────────────────────────────────────────────────────────
             s-0     n-1    n-2   Done    7.2 ms   2.0 ms     -"#]]
        .assert_eq(&task().text());
    }

    #[test]
    fn a_task_that_waits_for_its_time_shows_when_it_begins() {
        let task = TaskView {
            state: "scheduled".into(),
            not_before: "2026-01-01T02:00:00Z".into(),
            ..task()
        };
        let text = task.text();
        assert!(text.contains("\nbegins   2026-01-01T02:00:00Z\n"), "{text}");
        let list = vec![task].text();
        assert!(list.contains("scheduled   2026-01-01T02:00:00Z"), "{list}");
        let running = TaskView {
            state: "running".into(),
            not_before: "2026-01-01T02:00:00Z".into(),
            ..self::task()
        };
        assert!(!running.text().contains("begins"));
    }

    #[test]
    fn json_of_a_started_task_has_only_what_is_known() -> anyhow::Result<()> {
        let started = StartedView {
            instance_id: None,
            task_id: "t-1".into(),
            trace_id: String::new(),
            task: None,
        };
        expect![[r#"{"task_id":"t-1"}"#]].assert_eq(&serde_json::to_string(&started)?);
        Ok(())
    }

    #[test]
    fn an_empty_list_says_none() {
        assert_eq!(Vec::<HostView>::new().text(), "none");
    }
}
