//! Checks that `docs/behaviour.md` defines every rule that the repository cites by its id, and that every test that the
//! page names exists.
//!
//! In: the text files of the workspace. Out: each wrong citation, with its file and line.
//!
//! A citation is a word of one of [`LETTERS`] and a number from 1 to 99, as in "R6"; a small letter behind it names a
//! part of the rule. In Rust, a part of a function's name can be one too, in small letters. Words do not end at
//! underscores.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context as _, Result, ensure};

/// The page that defines the rules.
const PAGE: &str = "docs/behaviour.md";

/// The letters that ids begin with. Other letters with a number mean something else, such as address families.
const LETTERS: &str = "AEFHKPRW";

/// Words of the same form that are types.
const TYPES: [&str; 2] = ["F32", "F64"];

/// Endings of files that may cite rules. In other files, such as lock files and drawings, letters and numbers meet by
/// chance.
const ENDINGS: [&str; 9] = ["conf", "go", "md", "rs", "service", "toml", "tpl", "txt", "yaml"];

/// The packet cases, whose names have several words.
const CASES: &str = "tests/src/cases/";

/// The scenarios, which the page names by file.
const SCENARIOS: &str = "tests/scenarios/";

/// The texts of the workspace, by their paths below its root.
type Texts = BTreeMap<String, String>;

/// A row of the page.
#[derive(Debug, PartialEq, Eq)]
struct Row<'a> {
    id: &'a str,
    anchor: &'a str,
    /// The last cell.
    tests: &'a str,
}

/// Compares the workspace with the page.
///
/// # Errors
///
/// When a file cannot be read, or with every mistake.
pub(crate) fn check(workspace: &Path) -> Result<()> {
    let texts = texts(workspace)?;
    let page = texts.get(PAGE).with_context(|| format!("{PAGE} does not exist"))?;
    let wrong = wrong(page, &texts);
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    println!("{} rules", lines(page).filter_map(|(_, line)| row(line)).count());
    Ok(())
}

/// Reads the texts below a directory, without `target` and hidden files.
fn texts(root: &Path) -> Result<Texts> {
    let mut texts = Texts::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("reading {}", directory.display()))? {
            let entry = entry?;
            let (path, kind, name) = (entry.path(), entry.file_type()?, entry.file_name());
            let is_apart = name == "target" || name.to_string_lossy().starts_with('.');
            if kind.is_dir() && !is_apart {
                directories.push(path);
            } else if kind.is_file()
                && path.extension().is_some_and(|ending| ENDINGS.iter().any(|it| ending == *it))
            {
                let text = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
                let below = path.strip_prefix(root)?.to_string_lossy().into_owned();
                texts.insert(below, String::from_utf8_lossy(&text).into_owned());
            }
        }
    }
    Ok(texts)
}

/// The mistakes, one line each.
fn wrong(page: &str, texts: &Texts) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut defined = BTreeSet::new();
    let functions: BTreeSet<&str> = texts.values().flat_map(|text| functions(text)).collect();
    for (number, line) in lines(page) {
        let Some(row) = row(line) else { continue };
        let mut add = |what: &str| wrong.push(format!("{PAGE}:{number}: {}: {what}", row.id));
        if id(row.id) != Some(row.id) {
            add(&format!("no id of a rule, which is one of the letters {LETTERS} and a number"));
        }
        if row.anchor != row.id.to_ascii_lowercase() {
            add(&format!("has the anchor {}", row.anchor));
        }
        if !defined.insert(row.id) {
            add("is defined twice");
        }
        for test in row.tests.split('`').skip(1).step_by(2) {
            if !exists(test, texts, &functions) {
                add(&format!("there is no test, case or scenario `{test}`"));
            }
        }
    }
    for (path, text) in texts {
        for (number, line) in lines(text) {
            for cited in citations(line, path.ends_with(".rs")).filter(|id| !defined.contains(&**id)) {
                wrong.push(format!("{path}:{number}: {cited} is no rule of {PAGE}"));
            }
        }
    }
    wrong
}

fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    (1..).zip(text.lines())
}

/// Reads a row that defines a rule: `| <a id="r6"></a>R6 | … | … | tests |`.
fn row(line: &str) -> Option<Row<'_>> {
    let (anchor, rest) = line.strip_prefix("| <a id=\"")?.split_once("\"></a>")?;
    let (id, cells) = rest.split_once(" | ")?;
    let tests = cells.rsplit(" | ").next()?;
    Some(Row { id, anchor, tests })
}

/// Whether a test exists: a scenario by its file, a function by its name, a case by its words.
fn exists(test: &str, texts: &Texts, functions: &BTreeSet<&str>) -> bool {
    if test.ends_with(".txt") {
        return texts.contains_key(&format!("{SCENARIOS}{test}"));
    }
    let quoted = format!("\"{test}\"");
    functions.contains(test)
        || texts.iter().any(|(path, text)| path.starts_with(CASES) && text.contains(&quoted))
}

/// The ids that a line cites.
fn citations(line: &str, is_rust: bool) -> impl Iterator<Item = String> {
    let words = line.split(|character: char| !is_of_word(character)).filter_map(id).map(str::to_owned);
    let names = is_rust.then(|| functions(line)).into_iter().flatten();
    let parts = names
        .flat_map(|name| name.split('_'))
        .filter(|part| !part.contains(|it: char| it.is_ascii_uppercase()));
    words.chain(parts.filter_map(|part| {
        let upper = part.to_ascii_uppercase();
        (id(&upper) == Some(&*upper)).then_some(upper)
    }))
}

fn is_of_word(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_'
}

/// The word as an id, without the letter that names a part of the rule; `None` for other words.
fn id(word: &str) -> Option<&str> {
    let id = word.strip_suffix(|last: char| last.is_ascii_lowercase()).unwrap_or(word);
    let number = id.strip_prefix(|first| LETTERS.contains(first))?;
    let is_number = number.bytes().all(|digit| digit.is_ascii_digit()) && !number.starts_with('0');
    (is_number && (1..=2).contains(&number.len()) && !TYPES.contains(&id)).then_some(id)
}

/// The names of the functions that a text defines.
fn functions(text: &str) -> impl Iterator<Item = &str> {
    text.split("fn ").skip(1).filter_map(|rest| rest.split(|character: char| !is_of_word(character)).next())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str = "| <a id=\"r6\"></a>R6 | a rule | the same | `a case`, `a_test`, `some.txt` |\n";

    /// Written in two parts, because the check reads this file too.
    const UNKNOWN: &str = concat!("R", "66");

    fn texts(page: &str, others: &[(&str, &str)]) -> Texts {
        let tests = [
            ("tests/src/cases/some.rs", "case(\"R6\", \"a case\")"),
            ("proxy-user/src/some.rs", "fn a_test() {}"),
            ("tests/scenarios/some.txt", ""),
        ];
        let page = [(PAGE, page)];
        let all = tests.iter().chain(others).chain(&page);
        all.map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect()
    }

    fn wrong_in(page: &str, others: &[(&str, &str)]) -> Vec<String> {
        wrong(page, &texts(page, others))
    }

    #[test]
    fn citations_of_defined_rules_and_names_of_tests_that_exist_are_right() {
        let code = "// As R6 says, and R6b.\nfn r6_holds() {}\nfn visit_f64() {}\nlet r0 = A6_PORT; // F64, U32, V4, R0, 0xF9, R123, P-256, r66";
        assert_eq!(wrong_in(ROW, &[("a.rs", code)]), [""; 0]);
    }

    #[test]
    fn a_citation_of_no_rule_is_named_with_its_file_and_line() {
        for (path, text) in [
            ("docs/a.md", format!("one\nsee ({UNKNOWN}) and R6\n")),
            ("tests/a.rs", format!("\n\"{UNKNOWN}: no\"")),
            ("tests/b.rs", format!("\nfn r6_{}_holds() {{}}", UNKNOWN.to_lowercase())),
            ("scenarios/a.txt", format!("\n# {UNKNOWN}, R6")),
            ("a.rs", format!("\n/// {UNKNOWN}b.")),
        ] {
            let expected = format!("{path}:2: {UNKNOWN} is no rule of {PAGE}");
            assert_eq!(wrong_in(ROW, &[(path, &text)]), [expected]);
        }
    }

    #[test]
    fn a_row_that_is_wrong_is_named_with_its_line() {
        let twice = wrong_in(&format!("{ROW}{ROW}"), &[]);
        assert_eq!(twice, [format!("{PAGE}:2: R6: is defined twice")]);
        let anchor = wrong_in(&ROW.replace("\"r6\"", "\"r7\""), &[]);
        assert_eq!(anchor, [format!("{PAGE}:1: R6: has the anchor r7")]);
        let letter = wrong_in(&format!("{ROW}{}", ROW.replace("R6", "B6").replace("r6", "b6")), &[]);
        assert!(letter.len() == 1 && letter[0].starts_with(&format!("{PAGE}:2: B6: no id")), "{letter:?}");
        for test in ["a case", "a_test", "some.txt"] {
            let missing = wrong_in(&ROW.replace(test, &format!("other {test}")), &[]);
            let expected = format!("{PAGE}:1: R6: there is no test, case or scenario `other {test}`");
            assert_eq!(missing, [expected]);
        }
    }

    #[test]
    fn texts_are_found_by_their_endings_but_not_in_what_is_built_or_hidden() {
        let root = tempfile::tempdir().unwrap();
        for path in ["a.rs", "b/c.md", "b/d.json", "target/e.rs", "b/.f/g.rs"] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "R6").unwrap();
        }
        let found = super::texts(root.path()).unwrap();
        assert_eq!(found.into_keys().collect::<Vec<_>>(), ["a.rs", "b/c.md"]);
    }
}
