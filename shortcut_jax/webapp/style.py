"""How the web page looks: fonts of the visitor's own machine, light and dark, from telephones to wide screens."""

import gradio as gr

THEME = gr.themes.Soft(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(  # fonts of the visitor's own machine: the page loads nothing from elsewhere
    block_title_background_fill="none",
    block_title_background_fill_dark="none",
    block_title_text_color="*body_text_color",
    block_title_text_color_dark="*body_text_color",
    block_title_padding="0",
    body_text_color_subdued="*neutral_500",
    block_info_text_color="*neutral_500",
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    block_border_width="1px",
    block_shadow="none",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_hover="*primary_500",
)

CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#heading h1 {font-size: 1.5rem; margin: 0}
#heading p {color: var(--body-text-color-subdued); margin: .15rem 0 0}
#examples .gallery {gap: 6px}
#examples .gallery-item {padding: 4px 8px; font-size: .74rem}
#examples .gallery-item .gallery {padding: 0}
#seed-row {align-items: end}
#random {margin-bottom: 12px}
#size {color: var(--body-text-color-subdued); font-size: .85rem; margin: 0 .4rem}
.made img {image-rendering: pixelated}
#gallery .grid-container {grid-template-columns: repeat(auto-fit, minmax(min(150px, 45%), 1fr)) !important}
#gallery .grid-wrap {min-height: 230px; max-height: none}
#gallery:has(.preview) {min-height: min(520px, 100vw)}
#gallery .thumbnail-item {aspect-ratio: auto; border: none; box-shadow: none; background: none; overflow: visible}
#gallery .thumbnail-item img {height: auto; border-radius: var(--radius-md)}
#gallery .caption-label {position: static; background: none; border: none; box-shadow: none; padding: 4px 0 0;
  max-width: none; text-align: center; font-size: .92rem; color: var(--body-text-color-subdued)}
.compared img {border-radius: var(--radius-md)}
.note {display: inline-block; margin-top: .3rem; padding: .15rem .6rem; border-left: 3px solid #f59e0b;
  background: color-mix(in srgb, #f59e0b 12%, transparent); color: var(--body-text-color)}
.status {min-height: 2.6rem; font-size: .92rem; color: var(--body-text-color-subdued)}
.status [data-testid="status-tracker"]:has(.error) {display: none}
.status b, .time b {color: var(--body-text-color)}
.time {text-align: center; font-size: .92rem; color: var(--body-text-color-subdued)}
.track {height: 6px; border-radius: 3px; margin-top: 6px; background: var(--border-color-primary)}
.bar {height: 6px; border-radius: 3px; background: var(--primary-500)}
"""
