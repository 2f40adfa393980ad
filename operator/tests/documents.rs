//! What the documents point at is there: files, headings, commands, tests; and what they work out is so.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use birb_nest_operator::scaling::decide::{Hold, Memory, Policy, Sight, decide};

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize().expect("it is there")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// All documents, but not those of programs that lie about here.
fn documents() -> Vec<PathBuf> {
    let directories = ["", "docs", "docs/adr", "migrations"];
    let found: Vec<PathBuf> = directories
        .iter()
        .flat_map(|directory| fs::read_dir(root().join(directory)).expect("it is there"))
        .map(|entry| entry.expect("the directory can be read").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    assert!(found.len() > 20, "{found:?}");
    found
}

/// Lines of a document that are not in a block of code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut is_code = false;
    text.lines().filter(move |line| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        !is_code && !is_fence
    })
}

/// What a heading is found by, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        _ if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    let headings = prose(text).filter(|line| line.starts_with('#'));
    headings
        .map(|line| anchor(line.trim_start_matches('#').trim()))
        .collect()
}

fn targets_of_links(line: &str) -> impl Iterator<Item = &str> {
    let after = line.split("](").skip(1);
    after.filter_map(|rest| Some(rest.split_once(')')?.0))
}

#[test]
fn every_link_leads_to_a_file_and_a_heading() {
    let (mut n_links, mut broken) = (0, Vec::new());
    for document in documents() {
        let text = read(&document);
        for target in prose(&text).flat_map(targets_of_links) {
            if target.contains("://") {
                continue;
            }
            n_links += 1;
            let (path, heading) = target.split_once('#').unwrap_or((target, ""));
            let file = match path {
                "" => document.clone(),
                _ => document.parent().expect("it lies somewhere").join(path),
            };
            let is_there =
                file.exists() && (heading.is_empty() || anchors(&read(&file)).contains(heading));
            if !is_there {
                broken.push(format!("{}: {target}", document.display()));
            }
        }
    }
    assert!(n_links > 100, "{n_links} links");
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_make_command_in_the_documents_exists() {
    let makefile = read(&root().join("Makefile"));
    let targets: BTreeSet<&str> = makefile
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0))
        .collect();
    let (mut n_commands, mut missing) = (0, Vec::new());
    for document in documents() {
        let text = read(&document);
        // In backticks, or at the beginning of a line of code.
        for rest in text
            .split("`make ")
            .skip(1)
            .chain(text.split("\nmake ").skip(1))
        {
            let command = rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
            let command = command.into_iter().next().unwrap_or_default();
            n_commands += 1;
            if !command.is_empty() && !targets.contains(command) {
                missing.push(format!("{}: make {command}", document.display()));
            }
        }
    }
    assert!(n_commands > 40, "{n_commands} commands");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// Names of all functions in Rust code below `directory`.
fn functions(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).expect("it is there");
    let paths = entries.map(|entry| entry.expect("the directory can be read").path());
    let mut found = BTreeSet::new();
    for path in paths {
        if path.is_dir() {
            found.append(&mut functions(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = read(&path);
            let names = text.split("fn ").skip(1).filter_map(|rest| {
                rest.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
                    .next()
            });
            found.extend(names.map(str::to_owned));
        }
    }
    found
}

/// What is in backticks in `text` and looks like the name of a test: that of a metric begins otherwise, others are shorter.
fn names_of_tests(text: &str) -> impl Iterator<Item = &str> {
    let quoted = prose(text).flat_map(|line| line.split('`').skip(1).step_by(2));
    let names = quoted.map(|name| name.rsplit("::").next().unwrap_or(name));
    names.filter(|name| {
        name.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_')
            && name.matches('_').count() >= 3
            && !name.starts_with("birbnest_")
    })
}

#[test]
fn every_test_that_the_documents_name_exists() {
    let code =
        ["dataplane", "operator", "tests"].map(|directory| functions(&root().join(directory)));
    let (mut n_names, mut missing) = (0, Vec::new());
    for document in ["docs/CONSISTENCY.md", "docs/TESTING.md"] {
        let text = read(&root().join(document));
        for name in names_of_tests(&text) {
            n_names += 1;
            let was_renamed = text.contains(&format!("(then named `{name}`)"));
            if !was_renamed && !code.iter().any(|functions| functions.contains(name)) {
                missing.push(format!("{document}: {name}"));
            }
        }
    }
    assert!(n_names > 150, "{n_names} names");
    assert!(missing.is_empty(), "{missing:#?}");
}

/// The example nest of docs/OPERATOR.md, and all else by default.
fn policy() -> Policy {
    Policy {
        min: 1,
        max: 5,
        shards: 8,
        target_lag: 5000,
        drain: Duration::from_secs(30),
        activation_lag: 0,
        window: Duration::from_secs(300),
        cooldown: Duration::from_secs(60),
    }
}

/// Digits of `text`, and nothing where there are none.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = text.split(|c: char| !c.is_ascii_digit());
    digits.filter_map(|digits| digits.parse().ok()).next()
}

#[test]
fn the_worked_examples_of_scaling_are_what_is_decided() {
    let text = read(&root().join("docs/OPERATOR.md"));
    let head = "| `targetLag` 5000, `drainSeconds` 30, 1 to 5 workers | Lag | Rate seen | Workers |\n|---|---|---|---|\n";
    let (_, table) = text.split_once(head).expect("there are examples");
    let rows: Vec<Vec<&str>> = table
        .lines()
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let minute = |n: u64| Duration::from_secs(60 * n);
    let asked = |lag, rate| Sight {
        backlog: number(lag),
        rate: number(rate),
    };
    let mut n_rows = 0;
    for row in &rows {
        let [what, lag, rate, workers] = row[..] else {
            panic!("{row:?}");
        };
        n_rows += 1;
        let sight = asked(lag, rate);
        assert!(sight.backlog.is_some(), "{row:?}");
        if what == "5 workers, the burst was stored 4 minutes ago" {
            assert_eq!(workers, "5, one more minute");
            let memory = Memory::new(5, minute(0));
            let (memory, hold) = decide(&policy(), memory, sight, minute(4));
            assert_eq!((memory.workers, hold), (5, Hold::Window), "{what}");
            let (memory, hold) = decide(&policy(), memory, sight, minute(5));
            assert_eq!((memory.workers, hold), (1, Hold::None), "{what}");
            continue;
        }
        let (memory, hold) = decide(&policy(), Memory::new(1, minute(0)), sight, minute(1));
        let (before, after) = workers.split_once(", then ").unwrap_or(("1", workers));
        assert_eq!(number(before), Some(1), "{what}");
        assert_eq!(number(after), Some(memory.workers), "{what}");
        let expected = match what.contains("within 10 %") {
            true => Hold::Tolerance,
            false if after.ends_with("`maxReplicas`") => Hold::Max,
            false => Hold::None,
        };
        assert_eq!(hold, expected, "{what}");
    }
    assert!(n_rows >= 6, "{rows:?}");
}
