//! The text of INFO: read, merged over shards, and freed of what names a node.
//!
//! Invariant: what is merged says of the instance what a single Redis with all its data would say:
//! amounts are added, states are those of the worst shard, and ratios are made anew.

use std::collections::HashMap;
use std::fmt::Write as _;

/// One section: its name, and its lines in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Section {
    pub(super) name: String,
    pub(super) lines: Vec<(String, String)>,
}

/// A whole reply.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct InfoText {
    pub(super) sections: Vec<Section>,
}

impl Section {
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let line = self.lines.iter().find(|(name, _)| name == key);
        line.map(|(_, value)| value.as_str())
    }

    /// Changes a line that is there.
    pub(super) fn replace(&mut self, key: &str, value: impl ToString) {
        if let Some((_, old)) = self.lines.iter_mut().find(|(name, _)| name == key) {
            *old = value.to_string();
        }
    }

    /// Adds to a number; a line that is missing is made.
    pub(super) fn add(&mut self, key: &str, more: u64) {
        match self.lines.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = (old.parse().unwrap_or(0) + more).to_string(),
            None => self.lines.push((key.to_owned(), more.to_string())),
        }
    }
}

impl InfoText {
    pub(super) fn parse(text: &str) -> Self {
        let mut sections: Vec<Section> = Vec::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(name) = line.strip_prefix('#') {
                sections.push(Section {
                    name: name.trim().to_owned(),
                    lines: Vec::new(),
                });
            } else if let (Some(section), Some((key, value))) =
                (sections.last_mut(), line.split_once(':'))
            {
                section.lines.push((key.to_owned(), value.to_owned()));
            }
        }
        Self { sections }
    }

    pub(super) fn write(&self) -> String {
        let mut text = String::new();
        for (at, section) in self.sections.iter().enumerate() {
            let gap = if at == 0 { "" } else { "\r\n" };
            let _ = write!(text, "{gap}# {}\r\n", section.name);
            for (key, value) in &section.lines {
                let _ = write!(text, "{key}:{value}\r\n");
            }
        }
        text
    }

    pub(super) fn section(&mut self, name: &str) -> Option<&mut Section> {
        self.sections
            .iter_mut()
            .find(|section| section.name == name)
    }

    /// Takes out what only a host's operator may know: addresses and paths of nodes.
    pub(super) fn hide_places(&mut self, port: u16) {
        if let Some(server) = self.section("Server") {
            server.replace("tcp_port", port);
            server.replace("executable", "");
            server.replace("config_file", "");
            server.lines.retain(|(key, _)| !key.starts_with("listener"));
        }
        let Some(replication) = self.section("Replication") else {
            return;
        };
        replication.replace("master_host", "");
        replication.replace("master_port", 0);
        for (key, value) in &mut replication.lines {
            let number = key.strip_prefix("slave").unwrap_or("-");
            if number.bytes().all(|b| b.is_ascii_digit()) && value.starts_with("ip=") {
                let rest = value.split(',').filter(|field| !field.starts_with("ip="));
                let rest = rest.filter(|field| !field.starts_with("port="));
                *value = format!("ip=,port=0,{}", rest.collect::<Vec<_>>().join(","));
            }
        }
    }

    /// The texts of all shards as one. Sections and lines come in the order of the first text.
    pub(super) fn merge(texts: &[Self]) -> Self {
        let [first, others @ ..] = texts else {
            return Self::default();
        };
        if others.is_empty() {
            return first.clone();
        }
        let mut merged = Self::default();
        for text in texts {
            for section in &text.sections {
                if merged.section(&section.name).is_none() {
                    let same = texts.iter().flat_map(|text| &text.sections);
                    let same: Vec<_> = same.filter(|s| s.name == section.name).collect();
                    merged.sections.push(merge_section(&section.name, &same));
                }
            }
        }
        merged
    }
}

fn merge_section(name: &str, parts: &[&Section]) -> Section {
    let mut order: Vec<&str> = Vec::new();
    let mut values: HashMap<&str, Vec<&str>> = HashMap::new();
    for (key, value) in parts.iter().flat_map(|part| &part.lines) {
        let known = values.entry(key).or_insert_with(|| {
            order.push(key);
            Vec::new()
        });
        known.push(value);
    }
    let mut merged = Section {
        name: name.to_owned(),
        lines: Vec::new(),
    };
    for key in order {
        let value = merge_values(name, key, &values[key]);
        merged.lines.push((key.to_owned(), value));
    }
    match name {
        "Memory" => finish_memory(&mut merged),
        // Databases by number: a shard may have one that the first has not.
        "Keyspace" => (merged.lines)
            .sort_by_key(|(key, _)| key.trim_start_matches("db").parse().unwrap_or(u32::MAX)),
        // How many replicas differs by shard; which they are is nobody's business.
        "Replication" => merged.lines.retain(|(key, _)| {
            let number = key.strip_prefix("slave").unwrap_or("-");
            !number.bytes().all(|b| b.is_ascii_digit())
        }),
        _ => {}
    }
    merged
}

fn merge_values(section: &str, key: &str, values: &[&str]) -> String {
    let first = || values.first().copied().unwrap_or_default().to_owned();
    match section {
        "Server" if key.starts_with("uptime") => greatest(values),
        "Server" | "Cluster" | "Modules" => first(),
        "Keyspace" => merge_fields(values, |field| match field {
            "avg_ttl" => Fields::Greatest,
            _ => Fields::Sum,
        }),
        "Commandstats" => merge_calls(values),
        "Errorstats" => merge_fields(values, |_| Fields::Sum),
        "Latencystats" => merge_fields(values, |_| Fields::Greatest),
        "Replication" => match key {
            "connected_slaves" => least(values),
            "master_repl_offset" | "repl_backlog_size" | "repl_backlog_histlen" => sum(values),
            _ => first(),
        },
        _ if key.ends_with("_status") => {
            let bad = values.iter().find(|value| **value != "ok");
            bad.or(values.first())
                .copied()
                .unwrap_or_default()
                .to_owned()
        }
        _ if is_state(key) => greatest(values),
        _ if is_setting(key) || values.iter().any(|v| v.parse::<f64>().is_err()) => first(),
        _ => sum(values),
    }
}

/// A flag, a time or a length of time: of all shards the greatest counts.
fn is_state(key: &str) -> bool {
    let ends = [
        "_in_progress",
        "_enabled",
        "_scheduled",
        "_sec",
        "_usec",
        "_perc",
        "_ratio",
        "_time",
        "_eta_seconds",
        "_running",
        "_active",
        "_exceeded_time",
        "_last_cow_size",
    ];
    let alone = [
        "loading",
        "async_loading",
        "total_system_memory",
        // Every shard has all of these.
        "number_of_cached_scripts",
        "number_of_functions",
        "number_of_libraries",
    ];
    let exact = key.starts_with("client_recent_max") || key.starts_with("maxclients");
    let sums = [
        "expired_time_cap_reached_count",
        "total_eviction_exceeded_time",
    ];
    !sums.contains(&key) && (exact || alone.contains(&key) || ends.iter().any(|e| key.ends_with(e)))
}

fn is_setting(key: &str) -> bool {
    key.ends_with("_policy") || key.ends_with("_human") || key == "mem_allocator"
}

fn numbers<'a>(values: &'a [&str]) -> impl Iterator<Item = f64> + 'a {
    values.iter().filter_map(|value| value.parse().ok())
}

fn sum(values: &[&str]) -> String {
    let whole: Option<Vec<i128>> = values.iter().map(|v| v.parse().ok()).collect();
    match whole {
        Some(whole) => whole.into_iter().sum::<i128>().to_string(),
        None => decimal(values, numbers(values).sum()),
    }
}

fn greatest(values: &[&str]) -> String {
    extreme(values, |a, b| a > b)
}

fn least(values: &[&str]) -> String {
    extreme(values, |a, b| a < b)
}

/// The text of the value that comes before all others.
fn extreme(values: &[&str], before: impl Fn(f64, f64) -> bool) -> String {
    let number = |value: &str| value.parse().unwrap_or(0.0);
    let mut found = values.first().copied().unwrap_or_default();
    for value in values {
        if before(number(value), number(found)) {
            found = value;
        }
    }
    found.to_owned()
}

/// A number with as many decimals as the values have.
fn decimal(values: &[&str], number: f64) -> String {
    let places = |value: &&str| value.split_once('.').map_or(0, |(_, places)| places.len());
    let places = values.iter().map(places).max().unwrap_or(0);
    format!("{number:.places$}")
}

enum Fields {
    Sum,
    Greatest,
}

/// `keys=1,expires=0`: field by field.
fn merge_fields(values: &[&str], rule: impl Fn(&str) -> Fields) -> String {
    let mut fields: Vec<(&str, Vec<&str>)> = Vec::new();
    for (name, value) in values.iter().flat_map(|value| pairs(value)) {
        match fields.iter_mut().find(|(known, _)| *known == name) {
            Some((_, values)) => values.push(value),
            None => fields.push((name, vec![value])),
        }
    }
    let merged = fields.iter().map(|(name, values)| {
        let value = match rule(name) {
            Fields::Sum => sum(values),
            Fields::Greatest => greatest(values),
        };
        format!("{name}={value}")
    });
    merged.collect::<Vec<_>>().join(",")
}

fn pairs(value: &str) -> impl Iterator<Item = (&str, &str)> {
    value.split(',').filter_map(|field| field.split_once('='))
}

fn merge_calls(values: &[&str]) -> String {
    let merged = merge_fields(values, |_| Fields::Sum);
    let find = |name: &str| {
        let field = pairs(&merged).find(|(known, _)| *known == name);
        field
            .and_then(|(_, value)| value.parse::<f64>().ok())
            .unwrap_or(0.0)
    };
    let per_call = find("usec") / find("calls").max(1.0);
    let fields = pairs(&merged).map(|(name, value)| match name {
        "usec_per_call" => format!("usec_per_call={per_call:.2}"),
        _ => format!("{name}={value}"),
    });
    fields.collect::<Vec<_>>().join(",")
}

/// Ratios and readable sizes, from the sums.
fn finish_memory(memory: &mut Section) {
    let number =
        |memory: &Section, key: &str| memory.get(key).and_then(|value| value.parse::<f64>().ok());
    let ratios = [
        ("mem_fragmentation_ratio", "used_memory_rss", "used_memory"),
        (
            "allocator_frag_ratio",
            "allocator_active",
            "allocator_allocated",
        ),
        (
            "allocator_rss_ratio",
            "allocator_resident",
            "allocator_active",
        ),
        (
            "rss_overhead_ratio",
            "used_memory_rss",
            "allocator_resident",
        ),
    ];
    for (ratio, above, below) in ratios {
        if let (Some(above), Some(below)) = (number(memory, above), number(memory, below))
            && below > 0.0
        {
            memory.replace(ratio, format!("{:.2}", above / below));
        }
    }
    let human: Vec<String> = (memory.lines.iter())
        .filter_map(|(key, _)| key.strip_suffix("_human").map(str::to_owned))
        .collect();
    for name in human {
        if let Some(bytes) = number(memory, &name) {
            memory.replace(&format!("{name}_human"), readable(bytes));
        }
    }
}

/// `1.50M`, as Redis writes it.
fn readable(bytes: f64) -> String {
    let mut size = bytes;
    for unit in ["B", "K", "M", "G", "T"] {
        if size < 1024.0 || unit == "T" {
            let places = if unit == "B" { 0 } else { 2 };
            return format!("{size:.places$}{unit}");
        }
        size /= 1024.0;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_written_as_it_was_read() {
        let text = "# Server\r\nredis_version:7.0.15\r\n\r\n# Keyspace\r\ndb0:keys=1,expires=0\r\n";
        assert_eq!(InfoText::parse(text).write(), text);
        assert_eq!(InfoText::parse("").write(), "");
    }

    #[test]
    fn amounts_are_added_and_states_are_the_worst() {
        let a = InfoText::parse(
            "# Memory\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\nused_memory_rss:2097152\r\n\
             mem_fragmentation_ratio:2.00\r\nmaxmemory_policy:noeviction\r\n\
             # Persistence\r\nloading:0\r\naof_last_write_status:ok\r\nrdb_changes_since_last_save:3\r\n\
             # CPU\r\nused_cpu_sys:1.500000\r\n\
             # Commandstats\r\ncmdstat_get:calls=2,usec=10,usec_per_call=5.00,rejected_calls=0,failed_calls=0\r\n\
             # Keyspace\r\ndb0:keys=1,expires=1,avg_ttl=5\r\ndb9:keys=2,expires=0,avg_ttl=0\r\n",
        );
        let b = InfoText::parse(
            "# Memory\r\nused_memory:1048576\r\nused_memory_human:1.00M\r\nused_memory_rss:1048576\r\n\
             mem_fragmentation_ratio:1.00\r\nmaxmemory_policy:noeviction\r\n\
             # Persistence\r\nloading:1\r\naof_last_write_status:err\r\nrdb_changes_since_last_save:4\r\n\
             # CPU\r\nused_cpu_sys:0.250000\r\n\
             # Commandstats\r\ncmdstat_get:calls=3,usec=11,usec_per_call=3.67,rejected_calls=1,failed_calls=0\r\n\
             # Keyspace\r\ndb0:keys=5,expires=0,avg_ttl=0\r\ndb2:keys=7,expires=0,avg_ttl=0\r\n",
        );
        let want = "# Memory\r\nused_memory:2097152\r\nused_memory_human:2.00M\r\n\
             used_memory_rss:3145728\r\nmem_fragmentation_ratio:1.50\r\nmaxmemory_policy:noeviction\r\n\r\n\
             # Persistence\r\nloading:1\r\naof_last_write_status:err\r\nrdb_changes_since_last_save:7\r\n\r\n\
             # CPU\r\nused_cpu_sys:1.750000\r\n\r\n\
             # Commandstats\r\ncmdstat_get:calls=5,usec=21,usec_per_call=4.20,rejected_calls=1,failed_calls=0\r\n\r\n\
             # Keyspace\r\ndb0:keys=6,expires=1,avg_ttl=5\r\ndb2:keys=7,expires=0,avg_ttl=0\r\n\
             db9:keys=2,expires=0,avg_ttl=0\r\n";
        assert_eq!(InfoText::merge(&[a, b]).write(), want);
    }

    #[test]
    fn no_address_of_a_node_is_left() {
        let mut text = InfoText::parse(
            "# Server\r\ntcp_port:7001\r\nexecutable:/opt/x\r\nconfig_file:/etc/y\r\n\
             listener0:name=tcp,bind=10.0.0.1,port=7001\r\n\
             # Replication\r\nrole:master\r\nconnected_slaves:1\r\n\
             slave0:ip=10.0.0.2,port=7002,state=online,offset=5,lag=0\r\nslave_repl_offset:9\r\n",
        );
        text.hide_places(6379);
        let want = "# Server\r\ntcp_port:6379\r\nexecutable:\r\nconfig_file:\r\n\r\n\
             # Replication\r\nrole:master\r\nconnected_slaves:1\r\n\
             slave0:ip=,port=0,state=online,offset=5,lag=0\r\nslave_repl_offset:9\r\n";
        assert_eq!(text.write(), want);
    }
}
