//! `slotmesh proxy`: which proxies there are, and another process for them: the plan before, progress
//! while it runs.
//!
//! Invariant: what is shown as the plan is what the controller admits: it plans once more, and refuses
//! what it does not allow by then.

use clap::{Args, Subcommand};
use serde::Serialize;
use slotmesh_proto::{fleet::v1 as fleet, instance::v1 as api, task::v1 as task};

use crate::{
    api::Api,
    command::StartArgs,
    failure::Failure,
    operate::started,
    render::{self, Output, Text, or_dash, show, table},
    views::ProxyView,
};

/// What can be done with proxies.
#[derive(Debug, Subcommand)]
pub enum ProxyCommand {
    /// Every proxy that is connected.
    List {
        /// Only those of this instance.
        #[arg(long, value_name = "INSTANCE", default_value = "")]
        instance: String,
    },
    /// Gives proxies another version, one after the other; clients keep their connections.
    Upgrade(ProxyUpgradeArgs),
    /// Gives proxies another process of the version that they have: in place, where clients keep their
    /// connections, or on another host (--rebuild), to which they have to connect anew.
    Restart(ProxyRestartArgs),
}

/// Which proxies, when, and how they are watched.
#[derive(Debug, Clone, Args)]
pub struct ChangeArgs {
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
    /// When hand-overs begin: now, window (the instance's maintenance window), or a time such as
    /// 2026-11-22T03:00:00Z.
    #[arg(long, value_name = "now|window|TIME", default_value = "now")]
    pub at: String,
    /// Seconds for which each is watched before the next one [default: 10].
    #[arg(long, value_name = "SECONDS")]
    pub bake: Option<u32>,
    #[command(flatten)]
    pub start: StartArgs,
}

/// Arguments of `proxy upgrade`.
#[derive(Debug, Clone, Args)]
pub struct ProxyUpgradeArgs {
    #[command(flatten)]
    pub change: ChangeArgs,
    /// Only this one, and in this order; may be repeated [default: all].
    #[arg(long = "proxy", value_name = "ID")]
    pub proxies: Vec<String>,
    /// A listed version, such as 0.2.0, or an artifact's name, such as proxy-0.2.0.
    #[arg(long, value_name = "VERSION", default_value = "latest")]
    pub to: String,
    /// Shows what would be done, and does nothing.
    #[arg(long)]
    pub plan: bool,
}

/// Arguments of `proxy restart`.
#[derive(Debug, Clone, Args)]
pub struct ProxyRestartArgs {
    #[command(flatten)]
    pub change: ChangeArgs,
    /// Which, in this order; may be repeated.
    #[arg(long = "proxy", value_name = "ID", required = true)]
    pub proxies: Vec<String>,
    /// On another host, by a new proxy to which clients are sent.
    #[arg(long)]
    pub rebuild: bool,
    /// Of a rebuild of one proxy: where to [default: chosen].
    #[arg(long, value_name = "HOST", requires = "rebuild")]
    pub host: Option<String>,
    /// Of a rebuild: seconds after which clients that are left are closed [default: 600].
    #[arg(long, value_name = "SECONDS", requires = "rebuild")]
    pub drain_seconds: Option<u32>,
    /// Worker threads of each from then on [default: as before].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    pub workers: Option<u32>,
    /// Shows what would be done, and does nothing.
    #[arg(long)]
    pub plan: bool,
}

/// Does it.
///
/// # Errors
/// As the controller answered; [`Failure::TaskEnded`] when a task was waited for in vain.
pub async fn on_proxy(api: &mut Api, command: ProxyCommand, output: Output) -> Result<(), Failure> {
    match command {
        ProxyCommand::List { instance } => list(api, instance, output).await,
        ProxyCommand::Upgrade(args) => upgrade(api, args, output).await,
        ProxyCommand::Restart(args) => restart(api, args, output).await,
    }
}

async fn list(api: &mut Api, instance: String, output: Output) -> Result<(), Failure> {
    let request = fleet::ListProxiesRequest {
        instance_id: instance,
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.fleet().list_proxies(request).await }
        })
        .await?;
    let views: Vec<_> = answer.proxies.into_iter().map(ProxyView::from).collect();
    Ok(show(output, &views)?)
}

async fn upgrade(api: &mut Api, args: ProxyUpgradeArgs, output: Output) -> Result<(), Failure> {
    let request = api::UpgradeProxyRequest {
        instance_id: args.change.instance.clone(),
        proxy_instance_ids: args.proxies,
        version: match args.to.as_str() {
            "latest" => String::new(),
            version => version.to_owned(),
        },
        client_token: Api::token(args.change.start.client_token.clone()),
        bake_seconds: args.change.bake,
        schedule: Some(schedule(&args.change.at)),
        plan_only: args.plan,
        ..api::UpgradeProxyRequest::default()
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().upgrade_proxy(request).await }
        })
        .await?;
    follow(
        api,
        answer.task_id,
        answer.plan,
        args.change.start.wait,
        output,
    )
    .await
}

async fn restart(api: &mut Api, args: ProxyRestartArgs, output: Output) -> Result<(), Failure> {
    let request = api::RestartProxyRequest {
        instance_id: args.change.instance.clone(),
        proxy_instance_ids: args.proxies,
        client_token: Api::token(args.change.start.client_token.clone()),
        bake_seconds: args.change.bake,
        schedule: Some(schedule(&args.change.at)),
        mode: match args.rebuild {
            true => api::RestartMode::Rebuild.into(),
            false => api::RestartMode::InPlace.into(),
        },
        host_id: args.host.unwrap_or_default(),
        drain_seconds: args.drain_seconds,
        workers: args.workers.unwrap_or_default(),
        plan_only: args.plan,
        ..api::RestartProxyRequest::default()
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.instances().restart_proxy(request).await }
        })
        .await?;
    follow(
        api,
        answer.task_id,
        answer.plan,
        args.change.start.wait,
        output,
    )
    .await
}

/// Shows the plan, and the task when there is one.
async fn follow(
    api: &mut Api,
    task_id: String,
    plan: Option<api::ProxyPlan>,
    wait: bool,
    output: Output,
) -> Result<(), Failure> {
    let plan = plan.map(PlanView::from);
    if task_id.is_empty() {
        return match plan {
            Some(plan) => Ok(show(output, &plan)?),
            None => Ok(()),
        };
    }
    if let Some(plan) = plan.filter(|_| output == Output::Text) {
        render::note(plan.text().trim_end());
    }
    started(api, None, task_id, "proxies", wait, output).await
}

fn schedule(at: &str) -> task::Schedule {
    let when = match at {
        "now" => task::schedule::When::Now(true),
        "window" => task::schedule::When::InMaintenanceWindow(true),
        at => task::schedule::When::At(at.to_owned()),
    };
    task::Schedule { when: Some(when) }
}

#[derive(Debug, Clone, Serialize)]
struct PlanView {
    /// Empty: each keeps its own.
    program: String,
    begins_at: String,
    proxies: Vec<StepView>,
    remarks: Vec<String>,
}

#[derive(Debug, Clone, Serialize)]
struct StepView {
    proxy: String,
    host: String,
    program: String,
    version: String,
    nothing_to_do: bool,
    /// Empty: it stays on its host.
    to_host: String,
}

impl From<api::ProxyPlan> for PlanView {
    fn from(from: api::ProxyPlan) -> Self {
        let step = |p: api::ProxyStep| StepView {
            proxy: p.proxy_id,
            host: p.host_id,
            program: p.program,
            version: p.version,
            nothing_to_do: p.nothing_to_do,
            to_host: p.to_host_id,
        };
        Self {
            program: from.program,
            begins_at: from.begins_at,
            proxies: from.proxies.into_iter().map(step).collect(),
            remarks: from.remarks,
        }
    }
}

impl Text for PlanView {
    fn text(&self) -> String {
        if self.proxies.iter().all(|p| p.nothing_to_do) {
            return format!("every proxy runs {} already; nothing to do\n", self.program);
        }
        let moves = self.proxies.iter().any(|p| !p.to_host.is_empty());
        let to = match self.program.as_str() {
            "" if moves => "a new proxy on another host for each".to_owned(),
            "" => "another process of what each runs".to_owned(),
            program => format!("to {program}"),
        };
        let begins = match self.begins_at.as_str() {
            "" => "at once".to_owned(),
            at => format!("at {at}"),
        };
        let mut order = 0;
        let rows = self.proxies.iter().map(|p| {
            let what = match p.nothing_to_do {
                true => "nothing to do".to_owned(),
                false => {
                    order += 1;
                    match order {
                        1 => "1 (canary)".to_owned(),
                        order => order.to_string(),
                    }
                }
            };
            [
                what,
                p.proxy.clone(),
                from_to(&p.host, &p.to_host),
                or_dash(&p.version),
                program_or_own(&p.program),
            ]
        });
        let rows = table(["ORDER", "PROXY", "HOST", "RUNS", "PROGRAM"], rows);
        let remarks: String = self.remarks.iter().map(|r| format!("- {r}\n")).collect();
        format!("{to}, {begins}\n\n{rows}\n{remarks}")
    }
}

/// For people: where something is, and where it goes.
fn from_to(from: &str, to: &str) -> String {
    match to {
        "" => from.to_owned(),
        to => format!("{from} -> {to}"),
    }
}

/// For people: which program a proxy is to run.
pub(crate) fn program_or_own(program: &str) -> String {
    match program {
        "" => "the agent's own".to_owned(),
        program => program.to_owned(),
    }
}

/// One proxy's part of a task.
#[derive(Debug, Clone, Serialize)]
pub struct ProxyProgressView {
    /// Which proxy.
    pub proxy_id: String,
    /// Where it runs.
    pub host_id: String,
    /// How far it has come.
    pub phase: String,
    /// What it waits for, or how it ended.
    pub message: String,
    /// Empty: not known.
    pub from_version: String,
    /// Empty: the new process does not serve yet.
    pub to_version: String,
    /// 0: not known.
    pub handover_ms: f64,
    /// That were passed.
    pub clients: u32,
    /// Of a rebuild: the proxy that serves in its place.
    pub to_proxy_id: String,
    /// Where that one runs.
    pub to_host_id: String,
}

impl From<task::ProxyProgress> for ProxyProgressView {
    fn from(from: task::ProxyProgress) -> Self {
        Self {
            proxy_id: from.proxy_id,
            host_id: from.host_id,
            phase: from.phase,
            message: from.message,
            from_version: from.from_version,
            to_version: from.to_version,
            handover_ms: from.handover_ms,
            clients: from.clients,
            to_proxy_id: from.to_proxy_id,
            to_host_id: from.to_host_id,
        }
    }
}

/// As `task show` and `--wait` have it.
pub(crate) fn progress(proxies: &[ProxyProgressView]) -> String {
    table(
        [
            "PROXY",
            "HOST",
            "PHASE",
            "FROM",
            "TO",
            "HANDED OVER",
            "MESSAGE",
        ],
        proxies.iter().map(|p| {
            let passed = match (p.to_version.as_str(), p.handover_ms > 0.0) {
                ("", _) => "-".to_owned(),
                // Nothing is passed to another host.
                _ if !p.to_proxy_id.is_empty() => "-".to_owned(),
                (_, false) => format!("{} clients", p.clients),
                (_, true) => format!("{} clients in {:.0} ms", p.clients, p.handover_ms),
            };
            [
                from_to(&p.proxy_id, &p.to_proxy_id),
                from_to(&p.host_id, &p.to_host_id),
                p.phase.clone(),
                or_dash(&p.from_version),
                or_dash(&p.to_version),
                passed,
                or_dash(&p.message),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(proxy: &str, nothing_to_do: bool) -> api::ProxyStep {
        api::ProxyStep {
            proxy_id: proxy.into(),
            host_id: "h1".into(),
            version: "0.1.0".into(),
            nothing_to_do,
            ..api::ProxyStep::default()
        }
    }

    #[test]
    fn a_plan_shows_the_canary_first_and_what_to_know_before() {
        let plan = |done: [bool; 2]| {
            PlanView::from(api::ProxyPlan {
                program: "proxy-0.2.0".into(),
                proxies: vec![step("p-0", done[0]), step("p-1", done[1])],
                remarks: vec!["each is watched for 10 s".into()],
                begins_at: String::new(),
            })
        };
        let text = plan([true, false]).text();
        for part in [
            "to proxy-0.2.0, at once",
            "1 (canary)",
            "the agent's own",
            "- each is",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        let canary = text.lines().find(|l| l.contains("canary")).unwrap_or("");
        assert!(canary.contains("p-1"), "the first that is changed:\n{text}");
        assert!(plan([true, true]).text().contains("nothing to do"));
    }

    #[test]
    fn progress_shows_who_was_passed_in_how_long_once_the_new_one_serves() {
        let one = |to: &str| ProxyProgressView {
            proxy_id: "p-0".into(),
            host_id: "h1".into(),
            phase: "Bake".into(),
            message: String::new(),
            from_version: "0.1.0".into(),
            to_version: to.into(),
            handover_ms: 120.4,
            clients: 1_000,
            to_proxy_id: String::new(),
            to_host_id: String::new(),
        };
        assert!(progress(&[one("0.2.0")]).contains("1000 clients in 120 ms"));
        assert!(!progress(&[one("")]).contains("clients"));
    }

    #[test]
    fn a_rebuild_shows_from_where_to_where() {
        let plan = PlanView::from(api::ProxyPlan {
            proxies: vec![api::ProxyStep {
                to_host_id: "h3".into(),
                ..step("p-0", false)
            }],
            ..api::ProxyPlan::default()
        });
        let text = plan.text();
        assert!(text.starts_with("a new proxy on another host"), "{text}");
        assert!(text.contains("h1 -> h3"), "{text}");
        let shown = progress(&[ProxyProgressView::from(task::ProxyProgress {
            proxy_id: "p-0".into(),
            host_id: "h1".into(),
            to_version: "0.1.0".into(),
            to_proxy_id: "p-2".into(),
            to_host_id: "h3".into(),
            ..task::ProxyProgress::default()
        })]);
        assert!(
            shown.contains("p-0 -> p-2") && shown.contains("h1 -> h3"),
            "{shown}"
        );
        assert!(!shown.contains("clients"), "none is passed:\n{shown}");
    }

    #[test]
    fn a_time_is_now_the_window_or_what_was_said() {
        let of = |at| {
            schedule(at)
                .when
                .unwrap_or(task::schedule::When::Now(false))
        };
        assert_eq!(of("now"), task::schedule::When::Now(true));
        assert_eq!(
            of("window"),
            task::schedule::When::InMaintenanceWindow(true)
        );
        let at = "2026-11-22T03:00:00Z";
        assert_eq!(of(at), task::schedule::When::At(at.into()));
    }
}
