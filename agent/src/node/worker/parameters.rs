//! Engine parameters of a running node: as assigned, and as a leader sets them ahead of its record.
//!
//! Invariant: what was set ahead is found in an assignment in time, or what was before is set again.
//! Until then no assignment of before may undo it.

use std::{collections::BTreeMap, time::Duration};

use slotmesh_proto::agent::v1::{ProcessState, SetParametersRequest, SetParametersResponse};
use slotmesh_topology::parameter;
use tokio::time::Instant;

use super::Worker;
use crate::{
    control::{Control, ControlError, strings},
    fence::Dialect,
    handover::driver::chain,
    node::Assigned,
};

/// How long an assignment may take that has what was set ahead: an election in between, and a
/// session with the new leader.
const AHEAD_MAX: Duration = Duration::from_secs(30);

/// What was set ahead of the record.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Of the record that will have it.
    version: u64,
    /// By names in lower case: what the record has as long as it has nothing newer.
    previous: BTreeMap<String, String>,
    until: Instant,
}

/// What an assignment means for what was set ahead.
#[derive(Debug, PartialEq, Eq)]
enum Settled {
    /// It is from before; what was set ahead holds.
    NotYet,
    /// The record has it, or something newer.
    Stored,
    /// Nobody has stored it in time.
    Never,
}

impl Ahead {
    /// Adds a change to those that are not stored yet. What was there before the first of several
    /// changes is what the record has.
    fn extended(
        ahead: Option<Self>,
        version: u64,
        previous: &BTreeMap<String, String>,
        now: Instant,
    ) -> Self {
        let mut merged = previous.clone();
        let mut version = version;
        if let Some(older) = ahead {
            version = version.max(older.version);
            merged.extend(older.previous);
        }
        Self {
            version,
            previous: merged,
            until: now + AHEAD_MAX,
        }
    }

    fn settled(&self, version: u64, now: Instant) -> Settled {
        if version >= self.version {
            Settled::Stored
        } else if now < self.until {
            Settled::NotYet
        } else {
            Settled::Never
        }
    }
}

impl Worker {
    /// Sets parameters that are about to be stored: all, or none.
    pub(super) async fn set_ahead(
        &mut self,
        request: &SetParametersRequest,
    ) -> SetParametersResponse {
        let wanted: BTreeMap<&str, &str> = request
            .parameters
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        let is_reserved = |name: &&&str| parameter::is_reserved(&parameter::engine_name(name));
        if let Some(name) = wanted.keys().find(is_reserved) {
            return refusal(&format!("ERR parameter {name} is set by slotmesh"));
        }
        let dialect = self.run.dialect();
        if self.process.is_none() {
            return SetParametersResponse::default();
        }
        let Some(control) = self.admin().await else {
            return SetParametersResponse::default();
        };
        let previous = match values_of(control, wanted.keys().copied()).await {
            Ok(previous) => previous,
            Err(ControlError::Refused(words)) => return refusal(&words),
            Err(_) => return SetParametersResponse::default(),
        };
        let set = set_all(control, &wanted, &previous, dialect).await;
        if let Err(ControlError::Refused(words)) = &set {
            return refusal(words);
        }
        self.note_ahead(request, &previous);
        if let Err(error) = set {
            // It may have been set; as something ahead it is undone in time.
            tracing::warn!(node = %self.node_id, error = %chain(&error), "parameters perhaps set");
            return SetParametersResponse::default();
        }
        SetParametersResponse {
            running: true,
            refusal: String::new(),
            previous: previous.into_iter().collect(),
        }
    }

    fn note_ahead(&mut self, request: &SetParametersRequest, previous: &BTreeMap<String, String>) {
        let run = &mut self.run;
        for (name, value) in &request.parameters {
            let name = parameter::engine_name(name);
            if request.undo {
                // The record may say the same in other words: convergence sets those again.
                run.parameters.remove(&name);
                if let Some(ahead) = &mut run.ahead {
                    ahead.previous.remove(&name);
                }
            } else {
                run.parameters.insert(name, value.clone());
            }
        }
        if request.undo {
            run.ahead.take_if(|ahead| ahead.previous.is_empty());
            return;
        }
        let older = run.ahead.take();
        let ahead = Ahead::extended(older, request.version, previous, Instant::now());
        run.ahead = Some(ahead);
    }

    /// Parameters are no matter of epochs; a node gets them as soon as it answers.
    pub(super) async fn set_parameters(&mut self, assigned: &Assigned) {
        if !self.settle_ahead(assigned.spec.parameters_version).await {
            return;
        }
        for (parameter, value) in &assigned.spec.parameters {
            let name = parameter::engine_name(parameter);
            if self.run.parameters.get(&name) == Some(value) {
                continue;
            }
            // In the boot configuration, if this engine knows it.
            if parameter::boot_only_of(&name).is_some() {
                continue;
            }
            let result = if parameter::is_reserved(&name) {
                Err("it belongs to the mesh".to_owned())
            } else {
                match self.admin().await {
                    Some(control) => set_one(control, &name, value)
                        .await
                        .map_err(|error| chain(&error)),
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
            self.run.parameters.insert(name, value.clone());
        }
    }

    /// Whether the assignment's parameters hold: not while it is older than what was set ahead.
    async fn settle_ahead(&mut self, version: u64) -> bool {
        let Some(ahead) = &self.run.ahead else {
            return true;
        };
        match ahead.settled(version, Instant::now()) {
            Settled::NotYet => return false,
            Settled::Stored => {}
            Settled::Never => {
                let previous = ahead.previous.clone();
                tracing::warn!(node = %self.node_id, "parameters were set ahead and not stored; undone");
                for (name, value) in previous {
                    self.run.parameters.remove(&name);
                    let Some(control) = self.admin().await else {
                        return false;
                    };
                    if let Err(error) = set_one(control, &name, &value).await {
                        let error = chain(&error);
                        tracing::warn!(node = %self.node_id, %name, %error, "not undone");
                    }
                }
            }
        }
        self.run.ahead = None;
        true
    }
}

fn refusal(words: &str) -> SetParametersResponse {
    SetParametersResponse {
        running: true,
        refusal: words.to_owned(),
        previous: Default::default(),
    }
}

async fn set_one(control: &mut Control, name: &str, value: &str) -> Result<(), ControlError> {
    let args = ["CONFIG", "SET", name, value];
    control.call(&args).await.map(drop)
}

/// In one command where the engine takes several; otherwise one by one, and back.
async fn set_all(
    control: &mut Control,
    wanted: &BTreeMap<&str, &str>,
    previous: &BTreeMap<String, String>,
    dialect: Dialect,
) -> Result<(), ControlError> {
    if dialect != Dialect::Before7_0 {
        let mut args = vec!["CONFIG", "SET"];
        args.extend(wanted.iter().flat_map(|(name, value)| [*name, *value]));
        return control.call(&args).await.map(drop);
    }
    let mut done = vec![];
    for (name, value) in wanted {
        if let Err(error) = set_one(control, name, value).await {
            for name in done {
                let name = parameter::engine_name(name);
                if let Some(value) = previous.get(&name) {
                    set_one(control, &name, value).await?;
                }
            }
            return Err(error);
        }
        done.push(name);
    }
    Ok(())
}

/// By their names in lower case; one that the engine does not know is left out.
async fn values_of(
    control: &mut Control,
    names: impl Iterator<Item = &str>,
) -> Result<BTreeMap<String, String>, ControlError> {
    let mut values = BTreeMap::new();
    for name in names {
        let name = parameter::engine_name(name);
        let reply = strings(&control.call(&["CONFIG", "GET", &name]).await?);
        if let Some([_, value]) = reply.as_chunks::<2>().0.iter().find(|[n, _]| *n == name) {
            values.insert(name, value.clone());
        }
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn previous(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        let owned = |(n, v): &(&str, &str)| ((*n).to_owned(), (*v).to_owned());
        pairs.iter().map(owned).collect()
    }

    #[tokio::test]
    async fn what_nobody_stores_in_time_goes_back_to_before_the_first_change() {
        let now = Instant::now();
        let first = Ahead::extended(None, 4, &previous(&[("hz", "10")]), now);
        let later = now + AHEAD_MAX / 2;
        let both = previous(&[("hz", "20"), ("timeout", "0")]);
        let ahead = Ahead::extended(Some(first), 5, &both, later);
        assert_eq!(ahead.previous, previous(&[("hz", "10"), ("timeout", "0")]));
        let end = later + AHEAD_MAX;
        for (version, at, settled) in [
            (3, later, Settled::NotYet),
            (4, now + AHEAD_MAX, Settled::NotYet),
            (5, later, Settled::Stored),
            (6, end, Settled::Stored),
            (4, end, Settled::Never),
        ] {
            assert_eq!(ahead.settled(version, at), settled, "{version}");
        }
    }
}
