//! A picture of a terminal, for pages.
//!
//! In: lines of text. Out: an SVG file that is readable on light and on dark pages.

use std::fmt::Write as _;

/// The width of ten characters and the height of a line, in pixels.
const TEN_CHARACTERS: usize = 78;
const LINE: usize = 18;
/// Around the text.
const MARGIN: usize = 20;

/// Colours of GitHub's pages, which are also those of `docs/overview.svg`.
const STYLE: &str = r#"
    text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1f2328; white-space: pre }
    rect { fill: #f6f8fa; stroke: #d1d9e0 }
    .command { fill: #0969da; font-weight: 600 }
    .header { font-weight: 600 }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      rect { fill: #151b23; stroke: #3d444d }
      .command { fill: #4493f8 }
    }
"#;

/// Draws `lines`; those that begin with `$ ` are commands, and those in upper case are headers of tables.
pub(crate) fn svg(title: &str, lines: &[String]) -> String {
    let longest = lines.iter().map(|line| line.chars().count()).max().unwrap_or_default();
    let (width, height) = (pixels(longest) + 2 * MARGIN, lines.len() * LINE + 2 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         role=\"img\" aria-labelledby=\"title\" xml:space=\"preserve\">\n  <title id=\"title\">Output of {}</title>\n  \
         <style>{STYLE}  </style>\n  \
         <rect x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n",
        escaped(title),
        width - 1,
        height - 1
    );
    for (index, line) in lines.iter().enumerate().filter(|(_, line)| !line.is_empty()) {
        let baseline = MARGIN + index * LINE + LINE * 3 / 4;
        // Fonts differ in width; columns stay below each other where a line has the length of its characters.
        let length = pixels(line.chars().count());
        let _ = writeln!(
            svg,
            "  <text{} x=\"{MARGIN}\" y=\"{baseline}\" textLength=\"{length}\">{}</text>",
            class(line),
            escaped(line)
        );
    }
    svg + "</svg>\n"
}

fn pixels(characters: usize) -> usize {
    (characters * TEN_CHARACTERS).div_ceil(10)
}

fn class(line: &str) -> &'static str {
    let is_header = line.chars().any(char::is_alphabetic) && !line.chars().any(char::is_lowercase);
    match line {
        _ if line.starts_with("$ ") => " class=\"command\"",
        _ if is_header => " class=\"header\"",
        _ => "",
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_drawn_as_wide_as_its_characters() {
        let lines = ["$ a", "", "NAME   PLANE", "x      <none> & more"].map(str::to_owned);
        let svg = svg("a & b", &lines);
        assert!(svg.contains("<title id=\"title\">Output of a &amp; b</title>"), "{svg}");
        assert!(svg.contains("viewBox=\"0 0 196 112\""), "{svg}");
        let texts = svg.lines().filter(|line| line.starts_with("  <text")).collect::<Vec<_>>();
        assert_eq!(
            texts,
            [
                "  <text class=\"command\" x=\"20\" y=\"33\" textLength=\"24\">$ a</text>",
                "  <text class=\"header\" x=\"20\" y=\"69\" textLength=\"94\">NAME   PLANE</text>",
                "  <text x=\"20\" y=\"87\" textLength=\"156\">x      &lt;none&gt; &amp; more</text>",
            ]
        );
    }
}
